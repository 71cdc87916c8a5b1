"""The sections of gpu.py that measure its peer, timm on PyTorch; see its docstring."""

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sections import (
    Monitor,
    NotMeasuredError,
    Section,
    affordable_rows,
    in_windows,
    random_pixels,
    serve,
    spread_of,
    sweep,
)

# The same networks by timm's names; (side of the image, in pixels).
TIMM = {
    "efficientnet-lite0": ("tf_efficientnet_lite0", 224),
    "mobilenet": ("mobilenetv1_100", 224),
    "resnet50": ("resnet50", 224),
    "efficientnet-v2-s": ("tf_efficientnetv2_s", 384),
    "vit-b16": ("vit_base_patch16_224", 224),
}
NUM_BATCHES = 4  # different ones, in memory
NUM_STREAMS = 3  # one batch on its way there, one in work, one on its way back
LOWEST_COSINE = 0.99  # of what is compiled to what is not, in bfloat16 too
SHARED_MEMORY = Path("/dev/shm")


class Peer:
    """A network of timm from uint8 pixels to float32 vectors, compiled.

    Channels last, autocast to bfloat16: as its users would write it for speed. Float32 is
    float32 throughout, as it is in this package, and not TensorFloat-32.
    """

    def __init__(self, section: Section, network: str, precision: str, mode: str) -> None:
        """Make the network with random weights.

        Args:
            section: Gives the size of the images, where it is not the network's own.
            network: One of `TIMM`.
            precision: float32 or bfloat16.
            mode: Of `torch.compile`.

        Raises:
            NotMeasuredError: There is a card, and PyTorch does not use it.
        """
        import timm

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if section.settings["card"] and self.device == "cpu":
            raise NotMeasuredError(f"torch {torch.__version__} does not use the card")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        name, own_side = TIMM[network]
        self.side = (section.settings["image_size"] or [own_side])[0]
        self.network, self.mode = network, mode
        model = timm.create_model(name, num_classes=0, pretrained=False).eval()
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.data = timm.data.resolve_model_data_config(model)
        self.data["input_size"] = (3, self.side, self.side)
        self._mean, self._std = (
            255 * torch.tensor(self.data[name], device=self.device).view(1, 3, 1, 1)
            for name in ("mean", "std")
        )
        self._dtype = getattr(torch, precision)
        self._compiled = torch.compile(self._forward, mode=mode, dynamic=False)
        self.streams = [
            torch.cuda.Stream() if self.device == "cuda" else None for _ in range(NUM_STREAMS)
        ]

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 vectors of pixels: uint8 (batch, 3, height, width)."""
        enabled = self._dtype != torch.float32
        pixels = (pixels.float() - self._mean) / self._std
        with torch.autocast(self.device, self._dtype, enabled=enabled):
            return self.model(pixels.contiguous(memory_format=torch.channels_last)).float()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors on the device, of pixels there in the order channels last."""
        return self._compiled(pixels)

    @torch.inference_mode()
    def compile(self, pixels: torch.Tensor) -> dict[str, Any]:
        """Compile for a batch, or do without where that fails, and say which.

        Raises:
            NotMeasuredError: What was compiled gives other vectors.
        """
        pixels = pixels.to(self.device)
        begin = time.perf_counter()
        row: dict[str, Any] = {"mode": self.mode}
        try:
            found = self(pixels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - no C compiler, and much else
            row = {"mode": "not compiled", "why": f"{type(error).__name__}: {error}"[-500:]}
            self._compiled = self._forward
            found = self(pixels)
        row["compile_seconds"] = round(time.perf_counter() - begin, 1)
        plain = self._forward(pixels[:8])
        cosine = float(torch.nn.functional.cosine_similarity(found[:8], plain).min())
        if not cosine >= LOWEST_COSINE:
            raise NotMeasuredError(f"compiled, its vectors are others: cosine {cosine:.4f}")
        row |= {"device": self.device, "cosine": cosine, "gflops": gflops_of(self)}
        library = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
        return row | {"library": library + str(torch.backends.cudnn.version())}


known_gflops: dict[str, float] = {}


def gflops_of(peer: Peer) -> float:
    """Work of an image in 10**9 operations, of which PyTorch counts products and sums of layers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    if peer.network not in known_gflops:
        # Of attention in one piece, not every form is counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            peer.model(torch.zeros(1, 3, peer.side, peer.side, device=peer.device))
        known_gflops[peer.network] = round(counter.get_total_flops() / 1e9, 2)
    return known_gflops[peer.network]


@torch.inference_mode()  # for a tensor that was made elsewhere, all is compiled again
def random_batches(peer: Peer, batch_size: int) -> list[torch.Tensor]:
    """uint8 (batch, height, width, 3) in the host's memory, pinned where there is a card."""
    shape = (batch_size, peer.side, peer.side, 3)
    batches = [torch.from_numpy(random_pixels(shape, number)) for number in range(NUM_BATCHES)]
    return [batch.pin_memory() for batch in batches] if peer.device == "cuda" else batches


@torch.inference_mode()
def speed_of(peer: Peer, batches: list[torch.Tensor], seconds: float) -> float:
    """Images per second, vectors into the host's memory, several batches in flight.

    Args:
        peer: The network.
        batches: uint8 (batch, height, width, 3), in the host's memory or on the card.
        seconds: How long.
    """
    outputs: list[torch.Tensor | None] = [None] * NUM_STREAMS

    def start(number: int) -> None:
        place = number % NUM_STREAMS
        stream = peer.streams[place]
        if stream is not None:
            stream.synchronize()  # its batch before is done, and its vectors are here
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            pixels = batches[number % NUM_BATCHES].to(peer.device, non_blocking=True)
            vectors = peer(pixels.permute(0, 3, 1, 2))
            if outputs[place] is None:
                output = torch.empty(vectors.shape, dtype=torch.float32)
                outputs[place] = output.pin_memory() if stream is not None else output
            outputs[place].copy_(vectors, non_blocking=True)

    return repeat(start, len(batches[0]), seconds)


def repeat(start: Callable[[int], None], batch_size: int, seconds: float) -> float:
    """Images per second of batches that are started one after the other, after a warm-up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for number in range(NUM_BATCHES):
        start(number)
    wait()
    begin, number = time.perf_counter(), 0
    while number < NUM_BATCHES or time.perf_counter() - begin < seconds:
        start(number)
        number += 1
    wait()
    return round(number * batch_size / (time.perf_counter() - begin), 1)


def inference(section: Section) -> None:
    """The sweep of `gpu_ours.inference`, in the same order."""
    for mode in section.settings["compile_modes"]:
        for what in sweep(section.settings):
            section.measure(network_speed, **what, mode=mode)


def network_speed(
    section: Section, network: str, precision: str, batch_size: int, mode: str
) -> dict[str, Any]:
    settings = section.settings
    # Each size is compiled for itself, and not for any, as it would be after a few.
    torch._dynamo.reset()
    peer = Peer(section, network, precision, mode)
    batches = random_batches(peer, batch_size)
    row = peer.compile(batches[0].permute(0, 3, 1, 2)) | {"parallel": NUM_STREAMS}
    row |= in_windows(lambda: speed_of(peer, batches, settings["seconds"]), settings)
    with torch.inference_mode():
        there = [batch.to(peer.device) for batch in batches]
    found = in_windows(lambda: speed_of(peer, there, settings["seconds"] / 2), settings)
    return row | {"speed_on_device": found["speed"]}


# End to end. -------------------------------------------------------------------------------------


class Images:
    """The data set of files: `torch.utils.data.Dataset` needs no more than these methods."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        with Image.open(self.paths[number]) as image:
            return self.transform(image.convert("RGB"))


class FirstImages:
    """The numbers of so many: as that may change, the workers can be warm before the clock runs."""

    def __init__(self) -> None:
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def data_loader(peer: Peer, settings: dict[str, Any], images: FirstImages) -> Any:
    """PyTorch's loader with timm's transform but for normalising, which the card does.

    Batches pass through shared memory, or through a pipe where there is too little of it.
    """
    import timm.data

    transform = timm.data.create_transform(**peer.data, normalize=False)
    workers = settings["loader_workers"]
    return torch.utils.data.DataLoader(
        Images(sorted(Path(settings["many_photos"]).iterdir()), transform),
        sampler=images,
        batch_size=settings["loader_batch_size"],
        num_workers=workers,
        collate_fn=None if has_shared_memory(peer, settings) else as_arrays,
        pin_memory=peer.device == "cuda",
        persistent_workers=workers > 0,
    )


def has_shared_memory(peer: Peer, settings: dict[str, Any]) -> bool:
    """Whether two batches of each worker, and some that the card has yet to take, fit into it."""
    batch_bytes = settings["loader_batch_size"] * peer.side**2 * 3
    needed = (2 * settings["loader_workers"] + 4) * batch_bytes
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > needed


def as_arrays(images: list[torch.Tensor]) -> Any:
    return torch.stack(images).numpy()


def end_to_end(section: Section) -> None:
    """From JPEG files to a .npy file of vectors."""
    precision = section.settings["end_to_end_precision"]
    for network in section.settings["end_to_end"]:
        section.measure(folder_speed, network=network, precision=precision)


def folder_speed(section: Section, network: str, precision: str) -> dict[str, Any]:
    """An epoch to warm up, one to see the memory, and measured ones; each runs to its end."""
    settings = section.settings
    peer = Peer(section, network, precision, "default")
    size = settings["loader_batch_size"]
    # As in `inference`, so that what was compiled there is found.
    row = peer.compile(random_batches(peer, size)[0].permute(0, 3, 1, 2))
    images = FirstImages()
    loader = data_loader(peer, settings, images)
    run = functools.partial(
        embed_all, peer, loader, size, Path(settings["scratch"]) / "vectors.npy"
    )
    images.count = min(settings["rows"], settings["memory_rows"])
    run()
    with Monitor(with_host_memory=True) as monitor:
        begin = time.perf_counter()
        run()
    speed = images.count / (time.perf_counter() - begin)
    images.count = affordable_rows(section, speed)
    speeds, busy = [], []
    for _ in range(settings["rounds"]):
        with Monitor() as of_round:
            begin_time, begin = time.time(), time.perf_counter()
            run()
            speeds.append(images.count / (time.perf_counter() - begin))
        busy.append(of_round.busy_share(begin_time, time.time()))
    return {
        **{name: row[name] for name in ("mode", "why", "device", "library") if name in row},
        "rows": images.count,
        **spread_of(speeds),
        "busy": busy[-1],
        "batch_size": size,
        "workers": settings["loader_workers"],
        "by": "a pipe" if loader.collate_fn is as_arrays else "shared memory",
        **monitor.peaks,
        "written": "npy",
        "pixels": str(loader.dataset.transform),
        "rounds": [round(speed, 1) for speed in speeds],
    }


@torch.inference_mode()
def embed_all(peer: Peer, loader: Any, batch_size: int, out: Path) -> None:
    """Embed what a loader gives, and write it."""
    found: list[Any] = []
    num_rows = 0
    for batch in loader:
        pixels = torch.as_tensor(batch).to(peer.device, non_blocking=True)
        num_rows += len(pixels)
        if len(pixels) < batch_size:  # else the last batch would be compiled for
            pixels = torch.cat([pixels, pixels[:1].expand(batch_size - len(pixels), -1, -1, -1)])
        found.append(peer(pixels.contiguous(memory_format=torch.channels_last)))
    vectors = torch.cat(found)[:num_rows].cpu().numpy()
    if len(vectors) != len(loader.sampler):
        raise RuntimeError(f"{len(vectors)} vectors of {len(loader.sampler)} photographs")
    np.save(out, vectors)


if __name__ == "__main__":
    serve([inference, end_to_end])
