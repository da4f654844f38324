"""Word vectors: word2vec trained on text, files of other programs, neighbours and analogies. No torch here."""

from octavo.vectors.config import StartVectors, VectorsConfig
from octavo.vectors.corpus import Corpus
from octavo.vectors.formats import read, write
from octavo.vectors.query import Vectors
from octavo.vectors.training import Training, train

__all__ = ["Corpus", "StartVectors", "Training", "Vectors", "VectorsConfig", "read", "train", "write"]
