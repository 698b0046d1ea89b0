"""HF PEFT in a process of its own, to compare with: same models, same requests, numbers side by side.

`install.py` puts the reference into a folder of its own, `actions.py` says what can be asked of either library (through
the public API only), `worker.py` answers requests in a subprocess, `sides.py` is what the tests hold in their hands.
"""
