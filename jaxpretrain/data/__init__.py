"""Host side of data: sources, decoding, transforms, the loaders, and the copy to the device. Importing it imports nothing heavy."""
