"""The compiled part of the package; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "broker_filter.packets._walk",
            ["broker_filter/packets/_walk.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,  # without a compiler the package works, and decodes in Python
        )
    ],
    # One wheel serves every Python from 3.11 on: the extension keeps to the stable ABI.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
