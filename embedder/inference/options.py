"""What a model can be exported to."""

from typing import Literal

ExportFormat = Literal["keras", "saved-model", "onnx", "openvino", "litert"]
