"""Plugins: the models inside other alert brokers. One module per host; none of them imports another one."""
