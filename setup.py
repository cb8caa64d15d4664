"""Builds the native core with CMake and installs kernels/ as vlmfast.kernels; everything else is in pyproject.toml."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vlmfast" / "version.py").read_text()).group(1)


class CMakeBuild(build_ext):
    """Configures once and builds the Python module into the place where setuptools expects it."""

    def build_extension(self, extension):
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        debug = os.environ.get("DEBUG", "0") not in ("", "0")
        command = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVLMFAST_VERSION={VERSION}",
        ]
        subprocess.run(command, check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", str(build), "--target", "_native"] + (["-j", jobs] if jobs else []),
                       check=True)


setup(
    version=VERSION,
    packages=find_packages(include=["vlmfast", "vlmfast.*"]) + ["vlmfast.kernels"],
    package_dir={"vlmfast.kernels": "kernels"},
    package_data={"vlmfast.data": ["emoji/*"]},
    ext_modules=[Extension("vlmfast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
