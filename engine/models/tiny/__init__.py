"""The built-in language model: a 4-million-parameter Llama trained here on generated text, shipped with the package.

It exists so that everything can be tried and tested at once, without a download: `PATH` is an ordinary Hugging Face
model directory. `train.py` makes it, `evaluate.py` measures it, `corpus` generates what it has read.
"""

from pathlib import Path

PATH = Path(__file__).parent / "weights"
