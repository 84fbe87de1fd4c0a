"""The part of a wheel's build that pyproject.toml cannot say: compiled kernels.

With a C compiler at hand a wheel holds the kernels of its machine, each variant a library that
needs the C library only, and its tag names the platform. Without one the wheel is pure: kernels
are compiled on first use. For the C library of another machine, with Zig's compiler:

    pip wheel --no-deps . --config-settings=--build-option=--plat-name=manylinux_2_28_aarch64
"""

import importlib.util
import platform
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import OptionError

FILE = Path(__file__).parent / "kernels/variants.py"
_found = importlib.util.spec_from_file_location("variants", FILE)
assert _found is not None and _found.loader is not None
variants = sys.modules["variants"] = importlib.util.module_from_spec(_found)
_found.loader.exec_module(variants)


class KernelWheel(bdist_wheel):
    """Wheel with the compiled kernels of its platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.machine, self.compiler = platform.machine(), variants.find_compiler()
        if old := re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", self.plat_name):
            self.machine = old[3]
            target = f"{old[3]}-linux-gnu.{old[1]}.{old[2]}"
            if (found := variants.find_compiler(target)) is None:
                raise OptionError(f"{self.plat_name} needs Zig's compiler: pip install ziglang")
            self.compiler = found
        if sys.platform != "linux" or self.machine not in variants.VARIANTS:
            self.compiler = None
        # The tag names the platform; interpreter and ABI stay open, as the root stays pure.
        self.plat_name_supplied = self.compiler is not None

    def run(self) -> None:
        self.run_command("build")
        folder = Path(self.get_finalized_command("build").build_lib, "spectool/kernels/prebuilt")
        # Of a build before.
        shutil.rmtree(folder, ignore_errors=True)
        if self.compiler is not None:
            for variant in variants.VARIANTS[self.machine]:
                name = f"{variants.library_name(self.machine, variant)}.so"
                variants.compile_library(self.compiler, variant, folder / name)
        super().run()


setup(cmdclass={"bdist_wheel": KernelWheel})
