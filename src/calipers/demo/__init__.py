"""The embedded demo: a small trained language model, its tokenizer, and text."""

from pathlib import Path

__all__ = ["CALIBRATION_TEXT", "HELDOUT_TEXT", "MODEL_PATH"]

_DATA = Path(__file__).parent / "data"
#: A transformers directory: a Llama of about 1.9 million parameters.
MODEL_PATH = _DATA / "model"
#: Text of the kind that the model was trained on, to calibrate with.
CALIBRATION_TEXT = _DATA / "calibration.txt"
#: Text that neither the model nor its tokenizer has seen.
HELDOUT_TEXT = _DATA / "heldout.txt"
