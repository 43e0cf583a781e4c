"""Where files lie: folders of this machine and object stores, and what is done about their failures."""
