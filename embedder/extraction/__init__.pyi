from .cluster import (
    Pool as Pool,
    WorkerContext as WorkerContext,
    connect as connect,
)
from .extract import (
    OnProgress as OnProgress,
    Progress as Progress,
    run_extraction as run_extraction,
)
from .images import load_image as load_image
from .options import RunOptions as RunOptions
from .plan import make_plan as make_plan
from .record import Summary as Summary, grouped_reasons as grouped_reasons
from .worker import finished_vectors as finished_vectors, load_head as load_head
