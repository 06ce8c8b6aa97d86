"""The network of a container: read on the source, made anew on the target, cut and moved in the freeze.

`inspect` and `problems` read; `build` makes; `cut` catches what is sent while nobody is there; `forget` deletes.
All functions are synchronous: call them in a worker thread. Those of the freeze (`Cut.cut`, `BuiltNetwork.attach`,
`BuiltNetwork.announce`) only send messages that were built before, over sockets that were opened before.
"""
