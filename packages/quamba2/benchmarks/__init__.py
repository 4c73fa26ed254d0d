"""Side by side with the plain forms and with torchao: `isotone quamba2 bench`."""
