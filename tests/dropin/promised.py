"""The figure at which a whole model on a drop-in counts as the same."""

from __future__ import annotations

#: In float32 an output is this far from the unmodified model's, by the largest magnitude, and a gradient by its
#: parameter's. The rule of testing/ judges one attention; at a model's end it has nothing to hold on to.
PROMISED = 2e-5
