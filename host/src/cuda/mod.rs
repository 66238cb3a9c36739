//! Executes a plan on a CUDA device. Placeholder: see the module's owner.
