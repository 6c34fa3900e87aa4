"""Between hosts: who may talk, in what form, and what is promised when one of them fails.

A *frame* is a header and a body; a *message* is a typed struct in a frame, and a *tensor* is bytes
for memory that its receiver has set aside. A *stream*, of tensors or of messages, has a connection
of its own in each direction between two hosts. A *newcomer* has no certificate yet; a *peer* has.

frames                 the form of what is sent: a header of fixed size, bodies of bounded length
handshake              what two hosts say first, and how their differences are named
transport              the contract: send, expect, tell, hear
tcp_transport          between hosts: TCP with mutual TLS 1.3
gloo_transport         over torch.distributed, without authentication
simulated_transport    within a process, with a scripted clock and scripted faults
peer                   one connected host: what is under way with it, and how it is lost
connections            one direction, one thread: sends frames from a queue, or receives them
pending                what was asked of a peer and is not done yet; what peers have said
control_link           messages and heartbeats between agents and their master
blob_transfer          code and data that hosts fetch from their master
sockets                a message on a socket before a deadline; errors of sockets in our words
tls_stream             a socket under TLS that moves much at once, with an absolute deadline
identity               who a host is: its key, its certificate, the TLS contexts made of them
certificates           what is read in certificates: names, roles, fingerprints
certificate_authority  the cluster's CA: makes keys, signs, renews and revokes certificates
issued_certificates    the CA's book: which name has which key, and which certificates
revocation_list        the certificates of hosts that were removed
join_tokens            an invitation that can be pasted: address, CA fingerprint, one-time secret
shared_secret          the same without tokens, where all hosts have a secret file
arrivals               connections whose other side has not said who it is yet
counted_report         what strangers do: the first of it in a minute told, the rest counted
enrolment              a newcomer shows a secret and gets a certificate
"""
