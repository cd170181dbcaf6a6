"""The compiled parts of the package; everything else is in pyproject.toml."""

import os
import shutil

from setuptools import Extension, setup
from setuptools.command.build import build


class CleanBuild(build):
    """Builds into an empty directory, so that no file of an earlier build gets into the wheel."""

    def run(self) -> None:
        """Delete the results of an earlier build, then build."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    cmdclass={"build": CleanBuild},
    ext_modules=[
        Extension(
            f"broker_filter.{name}",
            [f"broker_filter/{name.replace('.', '/')}.c"],
            depends=["broker_filter/packets/_arrays.h", "broker_filter/packets/_inflate.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno"],  # products are rounded, as in numpy
            py_limited_api=True,
            # Without a compiler, the package decodes in Python, which is slower. The variable turns this into an error.
            optional=os.environ.get("BROKER_FILTER_REQUIRE_COMPILED") != "1",
        )
        for name in ("packets._walk", "packets._stamps", "scoring._normalise")
    ],
    # One wheel works with every Python from 3.11 on, because the extensions use only the stable ABI.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
