from .declared import check_arrays_of_archive as check_arrays_of_archive, read_json as read_json
from .hub import is_preset as is_preset
from .options import RecipeOptions as RecipeOptions
from .resolve import (
    build as build,
    dtype_policy as dtype_policy,
    find_backbone as find_backbone,
    layer_outputs as layer_outputs,
    layer_shapes as layer_shapes,
    load_network as load_network,
    make_recipe as make_recipe,
    pool as pool,
    row_of as row_of,
    single_output as single_output,
    tapped_tensors as tapped_tensors,
)
from .table import BACKBONES as BACKBONES, Backbone as Backbone
from .weight_files import (
    load_keras_model as load_keras_model,
    save_network as save_network,
    with_canonical_names as with_canonical_names,
)
from .weights import digest_of as digest_of, leaf_layers as leaf_layers
