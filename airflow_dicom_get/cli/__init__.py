"""The command line, ``dicom-get``: the verbs of the package in a shell."""
