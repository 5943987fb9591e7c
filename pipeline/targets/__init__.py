"""From scores to sparse targets.

`distributions` holds the ragged distributions with a tail, `build` computes the trust, the
residual and the stored entries of every position, `temperature` reads a truncated distribution at
another temperature, and `ceiling` states what targets can teach at best. All of it is numpy on
arrays; this room does not know files. Begin with `build`.
"""
