"""DICOM as bytes: P-DATA, command sets, contexts, headers, UIDs. No I/O, no clock, no logging."""
