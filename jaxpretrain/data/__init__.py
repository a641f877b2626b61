"""Host side of data: sources, decoding, transforms, loaders, and the copy to the devices; and what runs on the devices.

Importing this package imports nothing heavy.
"""
