"""Builds the extension xorl._C against the torch that is installed; without one, installs the Python alone."""

import os
import sys
from glob import glob

from setuptools import setup

NOTICE = """\
xorl is installed without its C++ extension, because {reason}.
Weight sync then runs its plain Python path. For the extension, install torch, ninja and pybind11, and then
    pip install --no-build-isolation .
"""


def extension() -> dict[str, object]:
    """What setup() needs to build it; nothing where it cannot be built, unless XORL_REQUIRE_EXT=1."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if os.environ.get("XORL_REQUIRE_EXT") == "1":
            raise SystemExit(f"XORL_REQUIRE_EXT=1, but torch cannot be imported: {error}") from error
        print(NOTICE.format(reason=f"torch cannot be imported here ({error})"), file=sys.stderr)
        return {}
    module = CppExtension(
        "xorl._C",
        sorted(glob("csrc/*.cpp")),
        depends=glob("csrc/*.h"),
        extra_compile_args=["-O2", "-g0", "-fvisibility=hidden", *sanitizer()],
        extra_link_args=sanitizer(),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def sanitizer() -> list[str]:
    """XORL_SANITIZE=address or thread: for `make sanitize`, which loads the runtime that it needs."""
    name = os.environ.get("XORL_SANITIZE")
    return [f"-fsanitize={name}", "-fno-omit-frame-pointer", "-g1"] if name else []


setup(**extension())
