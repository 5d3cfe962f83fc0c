"""The REST edge: HTTP and JSON in front of the same API that gRPC speaks.

    request ─▶ routing ─▶ query | json_in | events ─▶ api.call (encoded messages) ─▶ json_out ─▶ response

`bindings` reads the paths from the protos, `openapi` describes them, `docs` shows that in a browser, `app` puts it all
together.
"""
