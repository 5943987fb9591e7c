"""Turns conversations into tokens and marks which are supervised, and with what weight.

`encoder` renders a conversation with a chat template and tokenises it, `turns` finds the assistant
turns in the rendered text, `template` loads templates, `token_weights` maps the weights of a
message to tokens. This room does not know files or engines. Begin with `encoder`.
"""
