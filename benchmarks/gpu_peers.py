"""The sections of gpu.py that measure its peer, timm on PyTorch; see its docstring."""

import functools
import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sections import Monitor, Section, random_pixels, serve, sweep

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


class Peer:
    """A network of timm from uint8 pixels to float32 vectors, compiled.

    Channels last, autocast to bfloat16: as its users would write it for speed. Float32 is
    float32 throughout, as it is in this package, and not TensorFloat-32.
    """

    def __init__(self, network: str, precision: str, mode: str, side: int | None = None) -> None:
        """Make the network with random weights.

        Args:
            network: One of `TIMM`.
            precision: float32 or bfloat16.
            mode: Of `torch.compile`.
            side: Of the image, in pixels; else the network's own.
        """
        import timm

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        name, own_side = TIMM[network]
        self.side = side or own_side
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
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
        """Pixels (batch, 3, height, width), of 0 to 255 as uint8, or else normalised already."""
        enabled = self._dtype != torch.float32
        if pixels.dtype == torch.uint8:
            pixels = (pixels.float() - self._mean) / self._std
        with torch.autocast(self.device, self._dtype, enabled=enabled):
            return self.model(pixels.contiguous(memory_format=torch.channels_last)).float()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors on the device, of pixels (batch, 3, height, width) there."""
        return self._compiled(pixels)


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
    peer = Peer(network, precision, mode, settings["image_size"] and settings["image_size"][0])
    batches = random_batches(peer, batch_size)
    begin = time.perf_counter()
    with torch.inference_mode():
        peer(batches[0].to(peer.device).permute(0, 3, 1, 2))
    row = {"compile_seconds": round(time.perf_counter() - begin, 1), "device": peer.device}
    row |= {"parallel": NUM_STREAMS, "speed": speed_of(peer, batches, settings["seconds"])}
    there = [batch.to(peer.device) for batch in batches]
    return row | {"speed_on_device": speed_of(peer, there, settings["seconds"] / 2)}


# End to end. -------------------------------------------------------------------------------------


class Images:
    """The data set of files: `torch.utils.data.Dataset` needs no more than these methods."""

    def __init__(self, paths: list[Path], transform: Any = None) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        with Image.open(self.paths[number]) as image:
            return self.transform(image.convert("RGB")), 0


def data_loader(peer: Peer, paths: list[Path], batch_size: int, workers: int) -> Any:
    """PyTorch's loader with timm's transform, which normalises on the CPU."""
    import timm.data

    return torch.utils.data.DataLoader(
        Images(paths, timm.data.create_transform(**peer.data)),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=peer.device == "cuda",
        persistent_workers=workers > 0,
    )


def timm_loader(peer: Peer, paths: list[Path], batch_size: int, workers: int) -> Any:
    """The loader of timm, whose workers hand on uint8, and which normalises on the card, ahead."""
    import timm.data

    known = {name: peer.data[name] for name in ("interpolation", "mean", "std", "crop_pct")}
    return timm.data.create_loader(
        Images(paths),
        **(known | {"input_size": peer.data["input_size"], "batch_size": batch_size}),
        use_prefetcher=peer.device == "cuda",
        num_workers=workers,
        pin_memory=peer.device == "cuda",
        persistent_workers=workers > 0,
        device=torch.device(peer.device),
    )


LOADERS = {"DataLoader": data_loader, "timm's loader": timm_loader}


def end_to_end(section: Section) -> None:
    """From JPEG files to a .npy file of vectors."""
    precision = section.settings["end_to_end_precision"]
    for network in section.settings["end_to_end"]:
        for loader in LOADERS:
            section.measure(folder_speed, network=network, precision=precision, loader=loader)


def folder_speed(section: Section, network: str, precision: str, loader: str) -> dict[str, Any]:
    settings = section.settings
    peer = compiled_peer(network, precision, settings["image_size"] and settings["image_size"][0])
    size, workers = settings["loader_batch_size"], settings["loader_workers"]
    paths = sorted(Path(settings["many_photos"]).iterdir())
    images = LOADERS[loader](peer, paths, size, workers)
    out = Path(settings["scratch"]) / "vectors.npy"
    embed_all(peer, images, size, out, 4)  # to compile, and to start the workers
    with Monitor() as monitor:
        begin = time.time()
        num_rows = embed_all(peer, images, size, out)
        end = time.time()
    return {
        "batch_size": size,
        "workers": workers,
        "rows": num_rows,
        "speed": round(num_rows / (end - begin), 1),
        "busy": monitor.busy_share(begin, end),
        "peak_card_bytes": monitor.peak_card_bytes,
        "written": "npy",
    }


@functools.lru_cache(maxsize=1)
def compiled_peer(network: str, precision: str, side: int | None) -> Peer:
    """The same for both loaders, so that it is compiled once."""
    return Peer(network, precision, "default", side)


@torch.inference_mode()
def embed_all(
    peer: Peer, loader: Any, batch_size: int, out: Path, most_batches: int | None = None
) -> int:
    """Embed what a loader gives and write it; the number of vectors."""
    found: list[Any] = []
    num_rows = 0
    for pixels, _ in itertools.islice(loader, most_batches):
        num_rows += len(pixels)
        pixels = pixels.to(peer.device, non_blocking=True)
        if len(pixels) < batch_size:  # else the last batch would be compiled for
            pixels = torch.cat([pixels, pixels[:1].expand(batch_size - len(pixels), -1, -1, -1)])
        found.append(peer(pixels.contiguous(memory_format=torch.channels_last)))
    np.save(out, torch.cat(found)[:num_rows].cpu().numpy())
    return num_rows


if __name__ == "__main__":
    serve([inference, end_to_end])
