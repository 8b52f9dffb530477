"""Pages of `tunesmith ui`: run folders, data, plans and chats in a browser, from the
values that commands print.

A page holds nothing: what it shows lies in run folders, what it starts are commands in processes of their own,
and what is looked at is in the address. The server imports no torch.
"""
