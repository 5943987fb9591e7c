"""The server engine: a running vLLM server, over HTTP.

`scorer` asks it for prompt log-probabilities and checks that it runs the model, `api` sends
requests and decodes answers, and `answers` turns an answer into scores or refuses it. Begin with
`scorer`.
"""
