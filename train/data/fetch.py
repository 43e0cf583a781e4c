"""Fetching whole files from a store that fails now and then: verified, and tried again with growing pauses.

A fetch is one GET into a local file. Tried again: answers 5xx, dropped connections, short bodies, silence beyond the
timeout, and content that is not what the manifest says. Not tried again: a missing file, a refused permission, a full
disk. Pauses grow from 0.25 to 20 s, each cut by up to half at random so that the processes of a run do not come back
together. Build it in the process that uses it. Costs a look at the file four times a second while it fetches.
"""

import os

from jigsaw_pretrain.storage import _keep_inherited

os.register_at_fork(after_in_child=_keep_inherited)
