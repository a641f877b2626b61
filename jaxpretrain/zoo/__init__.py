"""The zoo: MMPretrain's models by name, with their weights, preprocessing, published results and licences."""

from jaxpretrain.zoo.index import ModelInfo, ModelName, Preprocessing, list_models, model_info

__all__ = ["ModelInfo", "ModelName", "Preprocessing", "list_models", "model_info"]
