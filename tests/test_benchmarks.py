"""Each benchmark runs, at a size that says nothing about speed, and prints what it promises."""

import base64
import hashlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
from PIL import Image

import embedder
from benchmarks.servers import Server, serving
from embedder.machine import num_cores
from embedder.store.store import Store
from tests import fake_nvml
from tests.support import ANIMALS, ROOT, add_rows, animal_vectors, make_archive, picture

FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        Image.fromarray(picture(number, 480, 640)).save(folder / f"{number}.jpg")
    return folder


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(pattern: str, output: str) -> list[list[float]]:
    """The numbers that a pattern finds, of each place where it does."""
    return [list(map(float, found.groups())) for found in re.finditer(pattern, output)]


def test_every_benchmark_is_run_here() -> None:
    text = Path(__file__).read_text()
    scripts = {path.name for path in FOLDER.glob("*.py")}
    scripts -= {"grocery_probe.py"}  # it needs Grocery
    scripts -= {
        "servers.py",
        "speed.py",
        "sections.py",
        "gpu_ours.py",
        "gpu_peers.py",
    }  # used by others
    assert {script for script in scripts if f'"{script}"' not in text} == set()


def test_throughput(photos: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    pipelines = ("--pipelines", "keras", "embedder float32")
    output = run(
        "throughput.py", photos, "--images", 20, "--rounds", 1, *pipelines, "--chart", chart
    )
    keras, ours = (line for line in output.splitlines() if "median" in line)
    assert "ratio 1.00" in keras
    (speed,), (decoding,), (inference,), (efficiency,) = (
        figures(rf"{name} +([\d.e+]+)", ours)[0]
        for name in ("median", "decode alone", "inference alone", "efficiency")
    )
    assert efficiency == pytest.approx(speed * (1 / decoding + 1 / inference), rel=0.02)
    assert "<svg" in chart.read_text()


def test_decode(photos: Path) -> None:
    output = run("decode.py", photos, "--images", 10, "--rounds", 1)  # no whole number of batches
    assert re.search(r"scaled +pixels differ from exact by .* 0 are identical", output)
    assert "cosine of scaled to exact embeddings" in output
    ((lowest,),) = figures(r"minimum (\d\.\d+)", output)
    assert 0.99 < lowest < 1


def test_engines() -> None:
    output = run("engines.py", "--networks", "mobilenet-v2", "--seconds", 0.1, "--rounds", 1)
    assert "mobilenet-v2        openvino   float32" in output
    assert "mobilenet-v2        tensorflow float32" in output


def test_several(photos: Path) -> None:
    size = ("--images", 14, "--rounds", 1, "--image-size", 64)
    output = run("several.py", photos, "--parts", "networks", *size)
    assert "mobilenet and mobilenet-v2 at once: ratio " in output


def test_backbones() -> None:
    output = run(
        *("backbones.py", "--networks", "mobilenet-v3-small", "--image-size", 64), "--rounds", 1
    )
    assert "| mobilenet-v3-small | 576 | 224 | 0.9 M | " in output


def test_store() -> None:
    output = run("store.py", "--rows", 20_000, "--dim", 256, "--rounds", 1)
    rows = re.findall(r"^(\w[\w ]*?) +write .* (\d+) MB$", output, re.MULTILINE)
    sizes = {name: int(size) for name, size in rows}
    assert list(sizes) == ["store", "nullable lists", "dictionary", "npy"]
    assert sizes["store"] < sizes["dictionary"] < sizes["npy"] == 20


def test_planning() -> None:
    output = run("planning.py", "--refs", 2000, 40_000)
    assert "2,000 refs" in output
    assert "40,000 refs" in output
    for total, *parts in figures(r"refs: +(\S+) s .*: (\S+), (\S+), (\S+)\)", output):
        assert total == pytest.approx(sum(parts), abs=0.021)  # of figures rounded to 0.01


def test_ridge() -> None:
    output = run("ridge.py", "--rows", 2000, 4000, "--dim", 32)
    for total, sums, solution in figures(r"rows: +(\S+) s \(sums (\S+), .* (\S+)\); peak", output):
        assert total == pytest.approx(sums + solution, abs=0.11)  # of figures rounded to 0.1
    assert "2,000 rows" in output
    assert "4,000 rows" in output


def test_neighbours() -> None:
    output = run("neighbours.py", "--rows", 4000, "--dim", 64)
    ((found,),) = figures(r"4,000 random rows: (\S+) of copies found", output)
    assert found > 0.95


def test_self_training(store: Store, tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        animals = sorted(ANIMALS * 9)
        ids = [f"{name}/{animal}/{i}.jpg" for i, animal in enumerate(animals)]
        add_rows(store, ids, animal_vectors(animals, seed=number, noise=0.4))
        lines = [f"{path}, {animal}, 0" for path, animal in zip(ids, animals, strict=True)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    size = ("--labels", 2, "--seeds", 0, "--other", store.path)
    output = run("self_training.py", store.path, tmp_path, *size)
    assert len(re.findall(r"^\| 2 \| same classes \|", output, re.MULTILINE)) == 4
    rows = figures(r"\| (0\.\d+) \| (0\.\d+|1\.000) \| (\S+) \(", output)
    assert len(rows) == 8
    for without, after, gain in rows:
        assert gain == pytest.approx(100 * (after - without), abs=0.16)  # of rounded figures


def test_heads(store: Store) -> None:
    animals = ["owls", "cats", "dogs"] * 20
    ids = [f"{animal}/{i}.jpg" for i, animal in enumerate(animals)]
    add_rows(store, ids, animal_vectors(animals))
    output = run("heads.py", store.path, "--heads", "centroid", "ridge")
    rows = figures(r"\| 1 \| \w+ \| (\d\.\d+) \((\d\.\d+) to (\d\.\d+)\)", output)
    assert len(rows) == 2
    assert all(low <= value <= high for value, low, high in rows)


def test_leak() -> None:
    pytest.importorskip("conformal_clip_data", reason="needs the demo images")
    output = run("leak.py", "--images", 24, "--folds", 2, "--heads", "centroid")
    assert len(figures(r"  .* (\d\.\d+) \((\d\.\d+) to (\d\.\d+)\)", output)) == 3
    ((found,),) = figures(r"(\d\.\d+) of the planted pairs", output)
    assert found > 0.5


def test_memory(photos: Path) -> None:
    pictures = ("--pictures", 2, "--side", 300, "--kinds", "progressive JPEG")
    output = run("memory.py", photos, "--images", 4, 12, *pictures)
    rows = figures(r"\| now \| (\d+) \| (\S+) \| (\S+) \| \S+ \| (\d+) \|", output)
    first, *others = rows
    assert first[1] == 1
    for peak, ratio, beside, num_failed in others:
        assert ratio == pytest.approx(peak / first[0], abs=0.01)
        assert (beside, num_failed) == (1, 0)
    assert "| 2 of 300 x 300, progressive JPEG |" in output


def test_decode_memory() -> None:
    output = run("decode_memory.py", "--side", 600, "--together", 2, "--kinds", "16 bits|^very")
    rows = [line.split(" | ") for line in output.splitlines()[2:]]
    assert [(row[0], row[2]) for row in rows] == [
        *(("| grey, 16 bits.png", number) for number in ("1", "2")),
        *(("| very many scans.jpg", number) for number in ("1", "2")),
    ]
    assert [row[-1].split(";")[0] for row in rows[:2]] == ["decoded |"] * 2
    assert all(row[-1].startswith("has ") for row in rows[2:])
    assert all(0 < float(row[4]) < 2 for row in rows)  # GiB


def test_workers(photos: Path) -> None:
    output = run("workers.py", photos, "--images", 24, "--rounds", 1, "--shard-size", 8)
    assert "ratio" in output


def test_startup(photos: Path) -> None:
    output = run("startup.py", photos, "--images", 12, "--rounds", 1)
    ((first, whole),) = figures(r"\| cached \| now \| (\S+) \| 1.00 \| (\S+) \| 1.00 \|", output)
    assert 0 < first < whole


BURN = "import time\nwhile time.process_time() < {}: pass"
FAMILY = f"""
import subprocess, sys
{BURN.format(0.1)}
subprocess.run([sys.executable, "-c", {BURN.format(0.3)!r}])
subprocess.Popen([sys.executable, "-c", {BURN.format(0.3)!r}])  # which outlives its parent
sys.exit(7)
"""


def test_runs() -> None:
    output = run("runs.py", "--memory", "--", sys.executable, "-c", FAMILY)
    measured = json.loads(output)
    assert measured["returncode"] == 7
    assert measured["num_left"] == 0
    assert 0.08 <= measured["own_cpu_seconds"] < 0.28  # in hundredths, rounded down
    assert 0.57 <= measured["children_cpu_seconds"] < 1
    assert measured["peak_bytes"] > 2**20


def test_runs_ends_what_never_would() -> None:
    family = FAMILY.replace("0.3", "1000")
    output = run("runs.py", "--most-seconds", 0.5, "--", sys.executable, "-c", family)
    assert json.loads(output)["returncode"] == -9


def ask(server: Server, path: str, method: str = "GET") -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=0.5)
    try:
        connection.request(method, f"/{server.name}{path}")
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise http.client.HTTPException(answer.status)
        return content
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("503", http.client.HTTPException),
        ("reset", ConnectionResetError),
        ("short", http.client.IncompleteRead),
        ("hang", TimeoutError),
    ],
)
def test_a_server_has_the_faults_it_was_asked_for(
    photos: Path, fault: str, error: type[Exception]
) -> None:
    with serving(photos, faults={fault: 1.0}) as server:
        for _ in range(2):
            with pytest.raises(error):
                ask(server, "/3.jpg")
        assert server.counts() == {"GET": 2, f"{fault} faults": 2}
        assert ask(server, "/3.jpg", "HEAD") == b""


def test_a_fault_of_a_server_hits_an_attempt_and_no_file_for_ever(photos: Path) -> None:
    with serving(photos, faults={"503": 0.5}) as server:
        for photo in photos.iterdir():
            for _ in range(30):
                try:
                    assert ask(server, f"/{photo.name}") == photo.read_bytes()
                    break
                except http.client.HTTPException as error:
                    assert error.args == (503,)
            else:
                pytest.fail(photo.name)
        counts = server.counts()
        assert counts["GET"] - counts["503 faults"] == len(list(photos.iterdir()))
        assert server.counts() == {}
        assert len(re.findall("<Key>", ask(server, "?list-type=2&prefix=1").decode())) == 3
    with pytest.raises(ConnectionError):
        ask(server, "/3.jpg")


def test_feeding_small() -> None:
    output = run("feeding.py", "small", "--images", 40, "--rounds", 1, "--decoders", 1)
    ((pillow, ratio),) = figures(r"\| plain Pillow, 1 thread \| (\d+) \| (\S+) \| 1.00", output)
    rows = figures(r"\| now.* \| (\d+) " + 3 * r"\| (\S+) " + 4 * r"\| (-?\d+) ", output)
    assert len(rows) == 2
    for speed, beside, share, own, engine, more, *_ in rows:
        assert share == pytest.approx(speed / pillow, abs=0.01)
        assert beside == pytest.approx(share * ratio, rel=0.1, abs=0.1)
        assert more == pytest.approx(own - engine, abs=1.1)  # of rounded figures


def test_feeding_photos(photos: Path) -> None:
    size = ("--images", 16, "--rounds", 1, "--precisions", "float32")
    output = run("feeding.py", "photos", photos, *size, "--before", ROOT)
    rows = figures(r"\| float32 \| (?:before|now) " + 5 * r"\| (\S+) ", output)
    assert len(rows) == 2
    assert rows[0][1] == 1
    assert rows[1][1] == pytest.approx(rows[1][0] / rows[0][0], abs=0.01)
    for speed, _, decoding, inference, efficiency in rows:
        assert efficiency == pytest.approx(speed * (1 / decoding + 1 / inference), rel=0.05)


# Without retries an attempt that goes wrong is a failure of the image.
HAS_RETRIES = (ROOT / "embedder" / "sources" / "attempts.py").exists()


def test_feeding_remote(photos: Path) -> None:
    faults = ("503=0.15", "reset=0.1", "short=0.1") if HAS_RETRIES else ()
    size = ("--images", 12, "--rounds", 1, "--latencies", 1)
    output = run("feeding.py", "remote", photos, *size, "--faults", *faults)
    rows = [line.split(" | ") for line in output.splitlines() if "| now |" in line]
    places = ["local disk", "HTTP, 1 ms", "S3, 1 ms"]
    places += [f"{place}, with faults" for place in places[1:]] * HAS_RETRIES
    assert [row[0] for row in rows] == [f"| {place}" for place in places]
    assert rows[1][4] == "1.00 GET"
    assert re.match(r"1.00 GET.* 0.08 LIST", rows[2][4])  # one for twelve images
    assert {row[6] for row in rows} == {"12 of 12", *["24 of 24"] * HAS_RETRIES}
    for _, _, speed, share, *_ in rows[1:3]:
        local = float(rows[0][2].split()[0])
        assert HAS_RETRIES or float(share) == pytest.approx(float(speed) / local, abs=0.01)
    for row in rows[3:]:
        assert re.search(r"\d 503, \d reset, \d short, 0 hang", row[7])
        assert "0 503, 0 reset, 0 short" not in row[7]


def test_poison() -> None:
    output = run("poison.py", "--images", 30, "--places", "in process")
    assert "| in process | now | 25 | 5 | 5 of 5 | 25 of 25 |" in output
    assert "| 0 | 0 |\n" in output  # status, and processes that are left


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` and a `model` of them, on features of small images."""
    folder = tmp_path_factory.mktemp("head")
    make_archive(folder / "photos", 40)
    store = embedder.extract(folder / "photos", folder / "features", image_size=(64, 96))
    embedder.train(store, "folder", duplicates=None).save(folder / "model")
    return folder


@pytest.mark.slow
def test_finetuning(head: Path, tmp_path: Path) -> None:
    strategies = ("--strategies", "scratch", "head", "--epochs", 1, "--views", 1)
    output = run("finetuning.py", head / "model", head / "photos", tmp_path / "out", *strategies)
    assert len(figures(r"\| (\d\.\d+) \((\d\.\d+) to (\d\.\d+)\)", output)) == 3
    assert [line.split(" | ")[0] for line in output.splitlines()[2:]] == [
        *("| frozen + logistic", "| scratch", "| head")
    ]


@pytest.mark.slow
def test_cut(head: Path) -> None:
    output = run("cut.py", head / "model", head / "photos", "--cuts", "stage7", "--epochs", 2)
    ((*_, same, usual),) = figures(r"\| stage7 " + 7 * r"\| ([\d.e-]+) ", output)
    assert same == 0
    assert usual < 1e-4


def test_kills() -> None:
    output = run("kills.py", "--kills", 1, "--images", 12, "--commands", "extract")
    assert re.fullmatch(
        r"extract +\d+ kills, 1 ends, 0 refused, 0 not whole, 0 different\n", output
    )


def test_house(tmp_path: Path) -> None:
    sources = {
        "embedder/__init__.py": '"""Nothing."""\n\nimport embedder.cli\n',
        "embedder/__main__.py": "print('usage')\n",
        "embedder/cli.py": "def main():\n    import embedder.errors, embedder.recipe\n",
        "embedder/decode.py": "import sklearn\n# 1.\n\ndef decode_rgb(a, b, c, d, e, f, *g): ...\n",
        "embedder/errors.py": "class Error:\n    def six(self, a, b, c, d, e, *, f): ...\n",
        "embedder/recipe.py": '"""One line\nand another."""\n\nfrom embedder import errors\n',
        "sklearn.py": "",
    }
    (tmp_path / "embedder").mkdir()
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    lines = run("house.py", "--before", tmp_path, "--rounds", 1).splitlines()[2:-2]
    before = {line.split(" | ")[0]: line.split(" | ")[1].split("; ")[-1] for line in lines}
    assert before == {
        "| modules in the package's root": "6",
        "| packages in it": "0",
        "| import levels": "4",
        "| longest function": "`main`, 2 lines",
        "| functions of more than 6 parameters": "1",
        "| lines of code": "9",
        "| `python`": "none of them",
        "| `import embedder`": "none of them",
        "| `from embedder.decode import decode_rgb`": "sklearn",
        "| `embedder --help`": "none of them",
    }


def test_reference(tmp_path: Path) -> None:
    run("reference.py", "--out", tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as new, np.load(FOLDER / "reference.npz") as stored:
        assert set(new) == {"sha256", "efficientnet-lite0", "mobilenet, random weights"}
        assert set(stored) == {*new, "mobilenet"}
        assert new["sha256"] == stored["sha256"]
        for name in set(new) - {"sha256"}:
            scale = float(stored[name].max())
            np.testing.assert_allclose(new[name] / scale, stored[name] / scale, atol=1e-4)


def test_gpu_inference(photos: Path, tmp_path: Path) -> None:
    parts = "--sections", "inference", "vectors jax"
    run("gpu.py", "--small", "--photos", photos, "--out", tmp_path, *parts)
    sections = json.loads((tmp_path / "gpu.json").read_bytes())["sections"]
    assert [row["batch_size"] for row in sections["inference"]["rows"]] == [4, 2]
    assert sections["vectors jax"]["rows"][0]["cosine"] > 0.9999
    assert set(sections) == {"inference", "vectors jax"}


@pytest.mark.slow
def test_gpu(photos: Path, tmp_path: Path) -> None:
    output = run("gpu.py", "--small", "--photos", photos, "--out", tmp_path)
    result = json.loads((tmp_path / "gpu.json").read_bytes())
    sections = result["sections"]
    assert list(sections) == [
        *("decoding", "inference", "inference of peers"),
        *("end to end, mobilenet", "end to end of peers, mobilenet"),
        *("vectors jax", "repeated", "cores"),
    ]
    for name, section in sections.items():
        assert f"\n{name}: " in output
        if importlib.util.find_spec("timm") is None and "peers" in name:
            assert section["reason"] == "not measured: no torch and no timm and no torchvision"
        else:
            assert "reason" not in section
    (vectors,) = sections["vectors jax"]["rows"]
    assert vectors["cosine"] > 0.9999
    assert vectors["again_is_equal"]
    assert [row["batch_size"] for row in sections["inference"]["rows"]] == [4, 2]
    assert [row["decoders"] for row in sections["decoding"]["rows"]] == [num_cores(), 1]
    for name in ("inference", "decoding", "end to end, mobilenet"):
        for row in sections[name]["rows"]:
            assert 0 < row["lowest"] <= row["speed"] <= row["highest"]
    assert all(row["gflops"] > 0 for row in sections["inference"]["rows"])
    same, limited = sections["repeated"]["rows"]
    assert same["equal"]
    assert (same["rows"], same["cosine"]) == (20, pytest.approx(1))
    for row in sections["cores"]["rows"]:
        assert row["decoding speed"] > 0
        assert row["openvino float32"] > 0
    sizes = {name: result["photographs"][name] for name in ("count", "width", "height")}
    assert sizes == {"count": 12, "width": 640, "height": 480}
    if result["card"] is None:
        assert limited["reason"] == "no card: XLA limits the memory of cards alone"
        assert "would fill it" not in output
    (alone,) = result["summary"]["inference"]
    (whole,) = result["summary"]["end to end"]
    assert whole["bound"] == min(whole["decoding"], alone["speed"]) > 0
    assert whole["share of bound"] == pytest.approx(whole["speed"] / whole["bound"], abs=1e-3)


def test_gpu_keeps_to_its_time(photos: Path, tmp_path: Path) -> None:
    parts = ("--sections", "repeated", "cores")
    run("gpu.py", "--small", "--photos", photos, "--out", tmp_path, "--budget", 4, *parts)
    sections = json.loads((tmp_path / "gpu.json").read_bytes())["sections"]
    assert {name: section["reason"] for name, section in sections.items()} == {
        "repeated": "took longer than its 3 s",
        "cores": "not measured: no time was left",
    }


def test_what_gpu_has_no_time_for_or_what_fails_is_told_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    settings = json.dumps({"decoders": [1, 2], "many_photos": "nowhere"})
    for seconds, reason in (0, "no time was left"), (60, "FileNotFoundError: "):
        file = tmp_path / f"{seconds}.jsonl"
        run("gpu_ours.py", "decoding", settings, file, seconds)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["decoders"] for row in rows] == [1, 2]
        assert all(row["reason"].startswith(reason) for row in rows)


def test_gpu_finds_modules_by_a_relative_path_and_a_card_by_the_driver(
    photos: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    fake_nvml.install_in(site, fake_nvml.Card("GPU-aa", bus=0x86))
    code = (site / "sitecustomize.py").read_text()
    log = f"import sys; open({str(tmp_path / 'started')!r}, 'a').write(sys.argv[0] + chr(10))"
    (site / "sitecustomize.py").write_text(f"{code}\n{log}")
    command = [sys.executable, FOLDER / "gpu.py", "--small", "--sections", "decoding"]
    command += ["--photos", photos, "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(("site", str(ROOT)))}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "gpu.json").read_bytes())
    assert result["card"]["id"] == "GPU-aa"
    assert result["card"]["pci"] == "0000:86:00.0"
    assert result["card"]["power_limit_watts"] is None
    assert all(row["speed"] > 0 for row in result["sections"]["decoding"]["rows"])
    # The command, its section, and at least a decoder.
    assert len((tmp_path / "started").read_text().splitlines()) >= 3


@pytest.mark.parametrize("end", ["os.abort()", "time.sleep(600)", "sys.exit(0)"])
def test_what_a_section_of_gpu_started_ends_with_it(tmp_path: Path, end: str) -> None:
    section = tmp_path / "section.py"
    section.write_text(
        "import os, subprocess, sys, time\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(child, start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        f"{end}\n"
    )
    code = "import json, sys; from sections import run_section\n"
    code += f"settings = {{'scratch': {str(tmp_path)!r}}}\n"
    code += f"print(json.dumps(run_section({str(section)!r}, 'any', settings, 4)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"},
        check=True,
        capture_output=True,
        text=True,
    )
    reasons = {"os.abort()": "ended with status -6", "time.sleep(600)": "took longer than its 4 s"}
    assert json.loads(done.stdout).get("reason", "").startswith(reasons.get(end, ""))
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_gpu_samples_the_card_that_it_may_use_and_says_none_for_what_it_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise pynvml.NVMLError_NotSupported

    cards = {b"0000:3b:00.0": fake_nvml.Card("GPU-aa", bus=0x3B, total=1)}
    cards[b"0000:86:00.0"] = fake_nvml.Card("GPU-bb", bus=0x86, total=2)
    known = fake_nvml.functions([*cards.values()]) | {
        "nvmlDeviceGetHandleByPciBusId": cards.__getitem__,
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=card.total, used=card.total),
        "nvmlDeviceGetUtilizationRates": refuse,
        "nvmlDeviceGetEnforcedPowerLimit": refuse,
    }
    for name, function in known.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.syspath_prepend(FOLDER)
    sections = importlib.import_module("sections")
    card = sections.card()
    assert (card["pci"], card["memory_bytes"]) == ("0000:86:00.0", 2)
    assert card["power_limit_watts"] is None
    with sections.Monitor(with_host_memory=True) as monitor:
        pass
    assert monitor.peaks["peak_card_bytes"] == 2
    assert monitor.peaks["peak_host_bytes"] > 2**20
    assert monitor.busy_share(0, float("inf")) is None
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", refuse)
    with sections.Monitor() as monitor:
        pass
    assert monitor.peaks == {"peak_host_bytes": None, "peak_card_bytes": None}


def test_gpu_compares_no_card_with_a_cpu_and_knows_no_bound_without_all_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    gpu = importlib.import_module("gpu")
    of_network = {"network": "resnet50", "precision": "bfloat16"}
    ours = of_network | {"device": "GPU", "batch_size": 256, "speed": 3000.0, "gflops": 8.0}
    peer = ours | {"device": "cuda", "speed": 2000.0, "mode": "default", "gflops": 10.0}
    decoding = {"decoders": 16, "cores": 16, "speed": 2000.0}

    def summary(peer: dict[str, object], decoders: int) -> dict[str, list[Any]]:
        rows = {
            "inference": [ours, ours | {"batch_size": 64, "speed": 9000.0}],
            "inference of peers": [peer],
            "decoding": [decoding | {"decoders": decoders}],
            "end to end, resnet50": [ours | {"shard_size": None, "busy": 0.5, "speed": 1000.0}],
            "end to end of peers, resnet50": [peer],
        }
        sections = {name: {"rows": found} for name, found in rows.items()}
        return gpu.summary({"sections": sections, "card": None})

    found = summary(peer, 16)
    assert found["inference"][0]["ratio"] == 1.5
    assert found["inference"][0]["ratio_by_gflops"] == 1.2
    assert found["end to end"][0]["bound"] == 2000
    assert found["end to end"][0]["share of bound"] == 0.5
    assert found["end to end"][0]["ratio"] == 0.5
    found = summary(peer | {"device": "cpu"}, 2)
    for row in (*found["inference"], *found["end to end"]):
        assert row["reason"] == "not compared: GPU and cpu"
        assert not {"ratio", "bound", "share of bound"} & row.keys()
    assert found["in words"] == ["Decoding with all cores was not measured: there is no bound."]


def test_slim_openvino(tmp_path: Path) -> None:
    kept = ("openvino/__init__.py", "openvino/libs/libopenvino.so.1")
    kept += ("openvino/libs/libopenvino_intel_cpu_plugin.so", "openvino/frontend/onnx/__init__.py")
    left_out = ("openvino/libs/libopenvino_intel_gpu_plugin.so", "openvino/include/a.hpp")
    left_out += ("openvino/frontend/onnx/py_onnx_frontend.so", "openvino/libs/cache.json")
    wheel = tmp_path / "openvino-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*kept, *left_out, "openvino-1.dist-info/RECORD"):
            file.writestr(name, f"{name},,\n")
    run("slim_openvino.py", wheel, tmp_path / "slim")
    with zipfile.ZipFile(tmp_path / "slim" / wheel.name) as file:
        assert set(file.namelist()) == {*kept, "openvino-1.dist-info/RECORD"}
        record = file.read("openvino-1.dist-info/RECORD").decode().splitlines()
    assert [line.split(",")[0] for line in record] == [*kept, "openvino-1.dist-info/RECORD"]
    assert record[0].split(",")[1:] == [
        "sha256="
        + base64.urlsafe_b64encode(hashlib.sha256(b"openvino/__init__.py,,\n").digest())
        .decode()
        .rstrip("="),
        "23",
    ]
