"""The commands on what is at hand: backbones, doctor. Each imports what it needs to run."""

from typing import TYPE_CHECKING, Annotated

import typer

from embedder.backbones import RecipeOptions
from embedder.cli import console
from embedder.cli.options import backbone_names, command
from embedder.errors import RequestError

if TYPE_CHECKING:
    from embedder.backbones import Backbone


@command
def backbones(
    name: Annotated[
        str | None, typer.Argument(help="Show this network alone.", autocompletion=backbone_names)
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="List what --layer can name, with shapes.")
    ] = False,
) -> None:
    """List the networks: name, dim, input size, parameters, licence, weights at hand or not."""
    from embedder.backbones import BACKBONES, find_backbone, layer_shapes

    if name is None and layers:
        raise RequestError("`--layers` wants the name of a network. Received: none")
    if name is None:
        console.print_table(
            ("backbone", "dim", "size", "parameters", "licence", "weights at hand"),
            [_backbone_cells(name, row) for name, row in BACKBONES.items()],
        )
        return
    name, row = find_backbone(name)
    if layers:
        shapes = layer_shapes(name).items()
        cells = [[layer, "x".join(map(str, shape))] for layer, shape in shapes]
        console.print_table(("layer", "output"), cells)
        return
    console.print_facts(
        {
            "backbone": name,
            "dim": f"{row.dim:,}",
            "image size": f"{row.image_size[0]}x{row.image_size[1]}, at least {row.min_side}",
            "crop": f"{row.crop_fraction:.3f} of the largest square, {row.interpolation}",
            "parameters": f"{row.num_parameters:,}",
            "licence": row.licence,
            "weights": _where_weights_are(row),
        }
    )


def _backbone_cells(name: str, row: "Backbone") -> list[str]:
    return [
        name,
        f"{row.dim:,}",
        "x".join(map(str, row.image_size)),
        f"{row.num_parameters / 1e6:.1f} M",
        row.licence,
        "yes" if row.weights is None or row.weights.path else row.weights.how_to_get,
    ]


def _where_weights_are(row: "Backbone") -> str:
    if row.weights is None:
        return "the preset's own"
    return str(row.weights.path or f"not on this machine. {row.weights.advice}")


@command
def doctor(
    backbone: Annotated[
        str, typer.Argument(help="The network to test.", autocompletion=backbone_names)
    ] = RecipeOptions.backbone,
    weights: Annotated[
        str | None, typer.Option(help="As in extract; random where none are at hand.")
    ] = None,
) -> None:
    """Show this machine, its GPUs and engines, and test BACKBONE's pixels, vectors and speed."""
    from embedder.checks import machine, self_test
    from embedder.machine import gpus

    found = gpus()
    console.print_facts(machine(found))
    console.out.print()
    examination = self_test(backbone, weights, found)
    if examination.feeding:
        console.print_facts(examination.feeding)
        console.out.print()
    console.print_checks(examination.checks)
