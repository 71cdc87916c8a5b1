"""Cards that are not there: `pynvml`'s functions answer as if NVIDIA's driver had some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass(frozen=True)
class Card:
    """A card, or a MIG instance with the card that it is of."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    bus: int = 0x3B
    capability: tuple[int, int] | None = (9, 0)
    total: int | None = 80 * 2**30
    refusal: str = ""  # name of NVML's error, where the card cannot be opened
    has_mig: bool = False
    whole: "Card | None" = None


def functions(cards: Sequence[Card], instances: tuple[Card, ...] = ()) -> dict[str, Any]:
    """Functions of `pynvml` by name, as on a machine with these cards."""

    def known(value: Any, error: type[Exception] = pynvml.NVMLError_NotSupported) -> Any:
        if value is None:
            raise error
        return value

    def card_at(index: int) -> Card:
        if cards[index].refusal:
            raise getattr(pynvml, cards[index].refusal)
        return cards[index]

    def instance_at(card: Card, index: int) -> Card:
        found = [instance for instance in instances if instance.whole == card]
        return known(found[index] if index < len(found) else None, pynvml.NVMLError_NotFound)

    def instance_of(uuid: bytes) -> Card:
        found = [instance for instance in instances if instance.uuid.encode() == uuid]
        return known(found[0] if found else None, pynvml.NVMLError_NotFound)

    def address(card: Card) -> SimpleNamespace:
        known(None if card.whole else card)
        return SimpleNamespace(domain=0, bus=card.bus, device=0)

    return {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.159.04",
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": card_at,
        "nvmlDeviceGetHandleByUUID": instance_of,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda card: known(card.whole),
        "nvmlDeviceGetMigMode": lambda card: known([1, 1] if card.has_mig else None),
        "nvmlDeviceGetMaxMigDeviceCount": lambda _: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": instance_at,
        "nvmlDeviceGetUUID": lambda card: card.uuid,
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetCudaComputeCapability": lambda card: known(card.capability),
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=known(card.total)),
        "nvmlDeviceGetPciInfo": address,
    }


def install(*cards: Card) -> None:
    """Give this process cards, as long as it lives."""
    for name, function in functions(cards).items():
        setattr(pynvml, name, function)


def install_in(folder: Path, *cards: Card) -> None:
    """Give cards to Python processes that look for modules in a folder, and in this project."""
    code = f"from tests.fake_nvml import Card, install; install(*{cards})"
    (folder / "sitecustomize.py").write_text(code)
