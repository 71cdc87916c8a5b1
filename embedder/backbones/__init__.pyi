from .declared import check_arrays_of_archive as check_arrays_of_archive, read_json as read_json
from .graph import (
    build as build,
    dtype_policy as dtype_policy,
    layer_shapes as layer_shapes,
    load_network as load_network,
    pool as pool,
    tapped_tensors as tapped_tensors,
)
from .hub import is_preset as is_preset
from .layers import (
    layer_outputs as layer_outputs,
    leaf_layers as leaf_layers,
    single_output as single_output,
    with_canonical_names as with_canonical_names,
)
from .options import RecipeOptions as RecipeOptions
from .resolve import (
    find_backbone as find_backbone,
    make_recipe as make_recipe,
    row_of as row_of,
)
from .table import BACKBONES as BACKBONES, Backbone as Backbone
from .weight_files import load_keras_model as load_keras_model, save_network as save_network
from .weights import digest_of as digest_of
