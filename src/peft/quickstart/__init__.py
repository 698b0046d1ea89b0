"""Complaint detection in customer messages: 50 examples, a real encoder, one LoRA adapter, about a minute on a laptop.

Run it with `peft quickstart` (or `make quickstart` in a checkout). Read it in this order:

    data.py      the messages, written for this purpose, and where the encoder comes from
    train.py     the model, the adapter and the training loop: what you would write yourself
    predict.py   a fresh process that loads the adapter and classifies
    run.py       the tour: trains the head alone and LoRA, saves, reloads, compares, prints
    picture.py   the one picture
"""
