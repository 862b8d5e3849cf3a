"""Triton: NVIDIA's tritonserver from PyPI (nvidia-pytriton), with the model repository in the folder of this file."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

package = Path(importlib.util.find_spec("pytriton").origin).parent
server, packages = package / "tritonserver", package.parent
stub, backend = "triton_python_backend_stub", server / "backends" / "python"
if not (backend / stub).exists():
    shutil.copy(server / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / stub, backend)
os.environ |= {"PACKAGES": str(packages), "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs")}
options = {
    "model-repository": Path(__file__).with_name("triton"),
    "backend-directory": server / "backends",
    "http-address": "127.0.0.1",
    "http-port": sys.argv[1],
    "allow-grpc": "false",
    "allow-metrics": "false",
}
command = server / "bin" / "tritonserver"
os.execv(command, [str(command), *(f"--{key}={value}" for key, value in options.items())])
