"""Builds the native extension; everything else is in pyproject.toml.

One abi3 library on torch's stable ABI: it serves every Python >= 3.10 and every torch >= 2.11.
io_uring comes from liburing, linked statically when it is found; NEXUS_URING=0 builds without.
Ranges for profilers need NVTX's headers, and nothing to link; NEXUS_NVTX=0 builds without.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
TORCH_2_11 = "0x020b000000000000"
# Where distributions keep static libraries; the linker's own search would prefer the shared one.
LIBRARY_FOLDERS = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
]
SYSTEM_HEADERS = Path("/usr/include")


def find_liburing() -> str | None:
    """The static library, if header and archive are both there."""
    if os.environ.get("NEXUS_URING") == "0" or not Path("/usr/include/liburing.h").exists():
        return None
    found = (Path(folder) / "liburing.a" for folder in LIBRARY_FOLDERS)
    return next((str(path) for path in found if path.exists()), None)


def find_nvtx() -> Path | None:
    """The folder that holds nvtx3/: of the wheel nvidia-nvtx, of a toolkit, or of the system."""
    if os.environ.get("NEXUS_NVTX") == "0":
        return None
    wheels = [folder for entry in sys.path for folder in Path(entry).glob("nvidia/*/include")]
    toolkits = [Path(os.environ["CUDA_HOME"]) / "include"] if os.environ.get("CUDA_HOME") else []
    found = [*wheels, *toolkits, SYSTEM_HEADERS]
    return next((folder for folder in found if (folder / "nvtx3/nvToolsExt.h").exists()), None)


def sources(has_uring: bool, has_nvtx: bool) -> list[str]:
    left_out = {
        "reader_uring_absent.cpp" if has_uring else "reader_uring.cpp",
        "range_absent.cpp" if has_nvtx else "range.cpp",
    }
    found = (ROOT / "csrc").rglob("*.cpp")
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name not in left_out)


liburing = find_liburing()
nvtx = find_nvtx()
native = CppExtension(
    "nexus_ext._native",
    sources(liburing is not None, nvtx is not None),
    include_dirs=[str(ROOT / "csrc")],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11), ("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-g1",
        "-Wall",
        "-Wextra",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        # Named once more, the system's own folder would lose its place in the search.
        *(["-isystem", str(nvtx)] if nvtx not in (None, SYSTEM_HEADERS) else []),
        *os.environ.get("NEXUS_CXXFLAGS", "").split(),
    ],
    extra_objects=[liburing] if liburing else [],
    py_limited_api=True,
)

setup(
    packages=[
        "nexus_ext",
        "nexus_ext.cache",
        "nexus_ext.experts",
        "nexus_ext.kernels",
        "nexus_ext.quant",
    ],
    package_dir={"nexus_ext": "nexus_ext", "nexus_ext.kernels": "kernels/triton"},
    package_data={"nexus_ext": ["py.typed", "*.pyi"]},
    ext_modules=[native],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
