"""For SGLang on a CPU: modules in the place of sgl_kernel and torchvision, which have no build that fits torch's CPU
build. SGLang imports names from them; whatever they hold can be named and not called.

Python imports this file at its start, in SGLang's child processes too, where this folder is in PYTHONPATH.
"""

import importlib.abc
import importlib.machinery
import sys
import types

NAMES = ("sgl_kernel", "torchvision")


class Nameable(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Stub(types.ModuleType):
    __version__ = "0.28.0"  # transformers asks torchvision
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*arguments, **keywords):
            raise RuntimeError(f"{self.__name__}.{name} is a stub and was called")

        value = Nameable(name, (), {"__init__": refuse})
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Behind the other finders: what is installed is taken."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def install():
    if not any(type(finder).__name__ == "Finder" and finder.__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(Finder())


install()
