"""Which tokens G_LM comes from when a text is scored."""

from typing import Literal, get_args

ScoreMode = Literal["full", "causal", "frozen"]
"""full: every token that is read, as in training, so that a score depends on later tokens; causal:
the context alone, as in decoding; frozen: one G_LM from outside for every text."""
SCORE_MODES: tuple[ScoreMode, ...] = get_args(ScoreMode)
