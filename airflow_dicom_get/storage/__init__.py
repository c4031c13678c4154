"""What sinks stand on: the calls of the disk, and the S3 client."""
