"""Packages that a GPU machine without a network lacks, as modules whose functions raise: this run needs none of them."""
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

NAMES = {"sgl_kernel", "flashinfer", "mistral_common", "IPython", "gguf"}


class Anything:
    """What a module that is not there gives: it can be named, subclassed and decorated with, and not called."""

    def __init__(self, name):
        self.__dict__["_name"] = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        raise ImportError(f"{self._name} is not here")

    def __mro_entries__(self, bases):
        return (object,)

    def __or__(self, other):
        return self

    __ror__ = __getitem__ = __or__


#: What is asked for at run time.
GIVEN = {("sgl_kernel.utils", "is_arch_support_pdl"): lambda: False}


class _Missing(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) in GIVEN:
            return GIVEN[self.__name__, name]
        return Anything(f"{self.__name__}.{name}")


def importer():
    """The package of the statement that imports: others, which look what is there, must not find stubs."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in ("importlib", "importlib.util") and "importlib" not in frame.f_code.co_filename:
            return name.split(".")[0]
        frame = frame.f_back


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    made = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in NAMES or importer() not in ("sglang", "compressed_tensors"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        self.made.append(spec.name)
        return _Missing(spec.name)

    def exec_module(self, module):
        pass


class BeforeSglang(importlib.abc.MetaPathFinder):
    """transformers 5.17 knows a model that SGLang 0.5.16 registers."""

    def find_spec(self, name, path=None, target=None):
        if name == "sglang":
            sys.meta_path.remove(self)
            from transformers import AutoConfig

            register = AutoConfig.register
            AutoConfig.register = staticmethod(lambda *args, **kwargs: register(*args, **{**kwargs, "exist_ok": True}))
        return None


def install():
    # The stubs behind all others: what is there is used.
    sys.meta_path.insert(0, BeforeSglang())
    sys.meta_path.append(Finder())
