"""From scores to sparse targets.

`distributions` holds ragged distributions with a tail, `build` computes the trust, the residual and
the stored entries of every position, `temperature` changes the temperature of a truncated
distribution, `translation` its vocabulary, and `ceiling` computes what targets can teach at best.
All works on numpy arrays; this room does not know files. Begin with `build`.
"""
