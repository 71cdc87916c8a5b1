"""Make OpenVINO's wheel half as large: what runs exported models on a CPU, and nothing else.

Left out are plug-ins for other devices, readers of other frameworks' models, and C++ headers. For
machines to which wheels travel by hand; see `make wheelhouse`.

    python benchmarks/slim_openvino.py openvino-2026.4.1-...whl FOLDER
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import zipfile
from pathlib import Path

LEFT_OUT = re.compile(
    r"""openvino/(
        libs/libopenvino_(?!intel_cpu_plugin|ir_frontend)   # libopenvino.so itself has no `_`
        | libs/(cache\.json|tbb\.pc)
        | frontend/\w+/.*\.so
        | include/ | cmake/
        | .*\.pyi
    )""",
    re.VERBOSE,
)
RECORD = re.compile(r"[^/]+\.dist-info/RECORD")


def digest_of(content: bytes) -> str:
    """As a wheel's RECORD has it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + digest.decode().rstrip("=")


def slim(wheel: Path, folder: Path) -> Path:
    """Write the smaller wheel, under the same name, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / wheel.name
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    settings = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 9}
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(new, "w", **settings) as out:
        for name in old.namelist():
            if LEFT_OUT.match(name):
                continue
            if RECORD.fullmatch(name):
                rows.writerow((name, "", ""))
                record_name = name
                continue
            content = old.read(name)
            out.writestr(name, content)
            rows.writerow((name, digest_of(content), len(content)))
        out.writestr(record_name, record.getvalue())
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    new = slim(options.wheel, options.folder)
    before, after = options.wheel.stat().st_size, new.stat().st_size
    print(f"{new}: {after / 2**20:.1f} MiB of {before / 2**20:.1f}")


if __name__ == "__main__":
    main()
