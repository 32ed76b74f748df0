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
    sources = sorted(glob("csrc/*.cpp"))
    module = CppExtension(
        "xorl._C", sources, depends=glob("csrc/*.h"), extra_compile_args=["-O2", "-g0", "-fvisibility=hidden"]
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
