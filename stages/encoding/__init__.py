"""Turns conversations into tokens and marks which are supervised, and with what weight.

`encoder` renders a conversation with a chat template and tokenises it, `turns` finds the assistant
turns and their contents in the rendered text, `template` loads a template and fixes its date,
`sandbox` runs it with limits, `token_weights` maps the weights of a message to tokens. This room
does not know the rows of files, nor engines. Begin with `encoder`.
"""
