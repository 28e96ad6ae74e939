"""``make demo``: two instances, streamed chats and live migrations, shown and measured.

``server`` starts and ends the processes, ``client`` streams answers, ``acts`` is the story that is
told, ``screen`` puts it on the terminal. Every number that is printed was measured in that run.
"""
