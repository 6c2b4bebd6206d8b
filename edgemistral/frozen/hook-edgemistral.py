"""PyInstaller's hook for edgemistral: adds what a frozen application needs and PyInstaller does not find.

* Kernels are compiled on the user's machine from their sources, so the bundle contains these next to the compiled modules.
* The demo model, the server's pages and the calibration texts are data.
* Many modules are imported at first use.
* `edgemistral warmup --into DIR`, then EDGEMISTRAL_BUNDLE=DIR pyinstaller ...: compiled kernels, too.
"""

import os
from pathlib import Path

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, collect_submodules

from edgemistral.demo import demo_model
from edgemistral.paths import BUNDLED

hiddenimports = [
    name for package in ("edgemistral", "edgemistral_quantize")
    for name in collect_submodules(package, lambda name: "frozen" not in name, on_error="ignore")
]
excludedimports = ["torch", "transformers", "matplotlib", "IPython"]      # optional for other libraries
module_collection_mode = {"edgemistral": "pyz+py", "edgemistral_quantize": "pyz+py"}
datas = [
    *collect_data_files("edgemistral"),
    *collect_data_files("edgemistral_quantize"),
    (str(demo_model()), "edgemistral/demo"),
]
binaries = collect_dynamic_libs("llvmlite")

if bundle := os.environ.get("EDGEMISTRAL_BUNDLE"):
    if not (Path(bundle) / "kernels").is_dir():
        raise SystemExit(f"EDGEMISTRAL_BUNDLE is {bundle}, which contains no kernels: edgemistral warmup --into {bundle}")
    datas.append((bundle, f"edgemistral/{BUNDLED}"))
