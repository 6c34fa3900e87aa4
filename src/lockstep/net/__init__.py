"""Between hosts: who may talk, in what form, and what is promised when one of them falls silent.

frames      the form of what is sent: a header of fixed size, bodies of bounded length
handshake   what two hosts tell each other first, and how their differences are named
tokens      an invitation that can be pasted: address, CA fingerprint, one-time secret
authority   the cluster's CA: makes keys, signs certificates
identity    who a host is: its key, its certificate, and the TLS contexts made of them
wire        one small message on a socket before a deadline; errors in our words
shared      the same without tokens, where all hosts have a secret file
joining     a newcomer shows a secret and gets a certificate
transport   the contract: send, expect, tell, hear
mailbox     what was asked of a peer and is not done yet
lanes       one connection, one direction, one thread
tcp         the transport between hosts: TCP with mutual TLS 1.3
gloo        the same contract over torch.distributed, without authentication
memory      the same contract within a process, with a scripted clock and scripted faults
"""
