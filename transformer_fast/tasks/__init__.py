"""What pretrained models are for, in one call each: text, labels, answers, speech, vectors.

Every task takes the folder of a checkpoint, a repository on the Hugging Face hub, or what :func:`load` gave, which
spares loading the model again. ``transformer-fast generate`` and its fellows are these functions on the command line.
"""

from transformer_fast.tasks.answering import Answer, answer
from transformer_fast.tasks.classifying import Label, classify, classify_images, zero_shot
from transformer_fast.tasks.embedding import SentenceEncoder, embed, load_sentence_encoder, minilm_folder
from transformer_fast.tasks.generating import generate, summarize, translate
from transformer_fast.tasks.loading import Loaded, load
from transformer_fast.tasks.streaming import TextStream
from transformer_fast.tasks.tagging import Entity, tag
from transformer_fast.tasks.tokenizing import FunctionTokenizer, TokenBatch, Tokenizer
from transformer_fast.tasks.transcribing import transcribe

__all__ = [
    "Answer",
    "Entity",
    "FunctionTokenizer",
    "Label",
    "Loaded",
    "SentenceEncoder",
    "TextStream",
    "TokenBatch",
    "Tokenizer",
    "answer",
    "classify",
    "classify_images",
    "embed",
    "generate",
    "load",
    "load_sentence_encoder",
    "minilm_folder",
    "summarize",
    "tag",
    "transcribe",
    "translate",
    "zero_shot",
]
