"""The exceptions of the package that Python does not have already."""


class CudaError(RuntimeError):
    """A call of the CUDA driver failed; the message names it and gives the driver's reason."""


class CudaUnavailable(RuntimeError):
    """There is no usable CUDA device or driver; the message says what would repair that."""
