"""Owns every named bound of the system: unit in the name, source and reason beside it.

What an operator may turn is a setting (`base.settings`) whose default stands here; everything else is law.
Relations between limits are checked when this module is imported, so a wrong edit cannot start.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# -- SMTP, LMTP, submission ------------------------------------------------------------------------------------
SMTP_COMMAND_LINE_OCTETS_MAX: Final = 4096  # RFC 5321 §4.5.3.1.4 asks 512; SMTPUTF8 and DSN parameters add to it
SMTP_AUTH_LINE_OCTETS_MAX: Final = 12_288  # RFC 4954 §4
SMTP_RECIPIENTS_MAX: Final = 1000  # RFC 5321 §4.5.3.1.8 asks at least 100
SMTP_ERRORS_MAX: Final = 20  # junk commands before 421
SMTP_TRANSACTIONS_MAX: Final = 10_000  # per connection, so that connections are renewed
SMTP_HELLO_OCTETS_MAX: Final = 255  # RFC 5321 §4.5.3.1.2
HOPS_MAX: Final = 50  # Received fields; RFC 5321 §6.3 asks at least 100 for counting servers, field practice is 50
HEADER_SCAN_OCTETS_MAX: Final = 256 * KIB  # how much of a message is looked at for trace fields
LOCAL_PART_OCTETS_MAX: Final = 254  # what a path has room for; RFC 5321 §4.5.3.1.1 asks 64, and for no limit where possible
ORIGINATOR_CHARS_MAX: Final = 16 * KIB  # of a From or Sender field that a user submits
DOMAIN_OCTETS_MAX: Final = 255  # RFC 5321 §4.5.3.1.2
PATH_OCTETS_MAX: Final = 256  # RFC 5321 §4.5.3.1.3, angle brackets included
ENVID_OCTETS_MAX: Final = 100  # RFC 3461 §4.4
ORCPT_OCTETS_MAX: Final = 500  # RFC 3461 §4.2
PROXY_HEADER_OCTETS_MAX: Final = 4096  # PROXY protocol v1: 107; v2 with TLVs: TLS facts, names, what clouds add

SMTP_COMMAND_TIMEOUT_S: Final = 300.0  # RFC 5321 §4.5.3.2.7
SMTP_STRESS_TIMEOUT_S: Final = 10.0  # when more than half of the connections are taken
SMTP_DATA_RATE_GRACE_S: Final = 300.0  # how long a sender may be slow before the minimum rate counts: RFC 5321 §4.5.3.2.7
SMTP_DATA_RATE_OCTETS_PER_S_MIN: Final = 500  # after the grace; a modem manages more
SUBMISSION_LOGIN_TIMEOUT_S: Final = 60.0
TLS_HANDSHAKE_TIMEOUT_S: Final = 20.0
DRAIN_TIMEOUT_S: Final = 30.0  # what is promised is finished within this after Ctrl-C: longer than a window and the index
REPLY_WRITE_TIMEOUT_S: Final = 120.0  # a client that does not read

# -- POP3 ---------------------------------------------------------------------------------------------------------
POP3_COMMAND_LINE_OCTETS_MAX: Final = 255  # RFC 2449 §4
POP3_AUTH_LINE_OCTETS_MAX: Final = 12_288
POP3_IDLE_TIMEOUT_S: Final = 600.0  # RFC 1939 §3: at least 10 minutes
POP3_LOGIN_TIMEOUT_S: Final = 180.0
POP3_ERRORS_MAX: Final = 20
POP3_LOG_GATHER_S: Final = 1.0  # retrievals of a session within this are one event of the log, a line each
POP3_LOG_KEYS_MAX: Final = 64  # in one event

# -- monitoring over HTTP -----------------------------------------------------------------------------------------
HTTP_CONNECTIONS_MAX: Final = 16
HTTP_CONNECTIONS_PER_ADDRESS_MAX: Final = 4  # where others may reach it; on this machine all have one address
HTTP_CONNECTION_S: Final = 10.0  # from accepting to the last octet of the answer; a scrape takes milliseconds
HTTP_LINGER_S: Final = 2.0  # for a body that nobody wants, and for the answer to a client that says nothing more
HTTP_LINE_OCTETS_MAX: Final = 4096  # of the request line
HTTP_FIELD_OCTETS_MAX: Final = 4096  # of one header field
HTTP_FIELDS_MAX: Final = 64
METRICS_FRESH_S: Final = 0.25  # an answer so young is given again: how often anybody asks costs mail nothing
METRICS_PIECE_SAMPLES: Final = 50  # written in one step of the event loop, about a millisecond
METRICS_LOOK_S: Final = 15.0  # how old figures of the index may be
METRICS_LOOK_SHARE: Final = 100  # and so many times as long as it took the index is left in peace

# -- authentication -----------------------------------------------------------------------------------------------
AUTH_FAILURES_PER_MINUTE_MAX: Final = (10, 30, 90)  # per /32, /26, /21 (IPv6 /64, /48, /32)
AUTH_FAILURES_PER_DAY_MAX: Final = (50, 150, 450)
AUTH_ACCOUNT_FAILURES_PER_MINUTE_MAX: Final = 30  # adds delay only: no lock-out of the owner
AUTH_FAR_OVER: Final = 10  # so many times a limit by address, and not even a right password is looked at
AUTH_DELAY_MAX_S: Final = 5.0
AUTH_TRACKED_MAX: Final = 100_000  # addresses and accounts remembered
AUTH_CACHE_MAX: Final = 50_000
SESSION_RECHECK_S: Final = 10.0  # how long an open session goes on before its account is looked at again
AUTH_CACHE_TTL_S: Final = 60.0  # an old password is dead everywhere within this
PASSWORD_OCTETS_MAX: Final = 1024  # refused before hashing
PASSWORD_CHECKS_WAITING_MAX: Final = 64  # argon2 holds 64 MiB each while it runs
PASSWORD_CHECK_MS_MAX: Final = 5000  # reckoned before anything is hashed, for a plain core: Dovecot's own argon2id takes 4,200
PASSWORD_CHECK_HELD_MS_MAX: Final = 250  # where libpass holds the interpreter's lock: phpass 2^17
PASSWORD_CHECK_OCTETS_MAX: Final = 1024 * MIB  # of memory, for argon2, scrypt and yescrypt: Dovecot's own argon2id
PASSWORD_SALT_OCTETS_MIN: Final = 4  # of a salted digest
PASSWORD_SALT_OCTETS_MAX: Final = 64

# -- messages and storage -----------------------------------------------------------------------------------------
CHUNK_OCTETS: Final = 256 * KIB  # unit of streaming, compression and checksumming
REPLICATE_HELD_OCTETS_MAX: Final = 512 * KIB  # body held for re-sending; beyond it is read back from a node
CHUNKS_MAX: Final = 65_535
RECORD_BODY_OCTETS_MAX: Final = 16 * MIB
SEGMENT_OCTETS_DEFAULT: Final = 64 * MIB
SEGMENT_OCTETS_MIN: Final = 64 * KIB
APPEND_WAITING_OCTETS_MAX: Final = 32 * MIB  # per node; appends wait at the door beyond it
APPEND_BATCH_RECORDS_MAX: Final = 1000  # buffers in one gathered write stay under IOV_MAX = 1024
NODE_RESERVE_OCTETS_DEFAULT: Final = 64 * MIB  # kept for tombstones and compaction on a full disk
NODE_LOW_FACTOR: Final = 2.0  # below reserve * this, `status` says that a disk is low
NODE_RESUME_FACTOR: Final = 1.5  # a full node is writable again above reserve * this
NODE_PROBE_INTERVAL_S: Final = 1.0
NODE_PROBE_TIMEOUT_S: Final = 10.0  # F14: fenced within this
NODE_RECEIPT_TIMEOUT_S: Final = 4.0  # P20: a blip is at most 5 s; then the next node in placement order
NODE_READ_TIMEOUT_S: Final = 4.0  # P20: then another copy is read
READ_LATE_UNKNOWN_S: Final = 0.1  # P20: then another copy is asked beside one that has no history yet
READ_LATE_MIN_S: Final = 0.005  # no read is late before: a turn of a busy loop takes as long
READ_LATE_MAX_S: Final = 0.25  # every read is late then
READ_LATE_SHARE: Final = 0.1  # of all reads may be asked twice
READ_LATE_BURST: Final = 10  # and so many at once
READ_NEAR_S: Final = 0.005  # who takes no longer is as near as any
READ_RANKS_S: Final = 0.25  # how old the order may be in which nodes are read
READ_HISTORY_S: Final = 60.0  # what a node took longer ago says nothing of it now
NODE_SLOW_S: Final = 0.25  # a write or probe that takes longer makes a node the last choice (P20)
NODE_SLOW_REMEMBERED_S: Final = 10.0  # for so long after the last sign of it
NODE_PRESENCE_CHECK_S: Final = 0.05  # how long a node may write before it looks whether its directory is still there
LAYOUT_EPOCH: Final = 1_000_000  # versions of the layout in one epoch of the index
LAYOUT_JUMP: Final = 1000  # versions that a layout is put back ahead of the last that is known: others may know of later ones
LAYOUT_LOOK_S: Final = 1.0  # how often a process asks whether the layout has changed
MOVE_LOOK_S: Final = 2.0  # how often a keeper looks how far a drain is
MOVE_LOOK_SHARE: Final = 20.0  # so many times as long as a look took until the next: it counts all messages
MOVE_IDLE_S: Final = 5.0  # how often it looks whether there is anything to move
MOVE_COPIES_PER_S: Final = 100.0  # for estimates: copies that repair makes in a second
MOVE_OCTETS_PER_S: Final = 20 * MIB  # and octets
REBALANCE_SLACK: Final = 0.05  # nodes whose disks are filled so much more or less than the others are left alone
REBALANCE_BATCH: Final = 32  # copies that are moved in one step
PLACEMENT_LOOK_S: Final = 0.05  # how old the figures of nodes may be by which a message is placed
PLACEMENT_DRAWS: Final = 16  # placements drawn by the same figures, then taken in turn
PLACEMENT_NODES: Final = 100  # of so many nodes figures are looked at so often; of more, less often
PLACEMENT_OF_A_KIND: Final = 32  # nodes of a site and priority among which placements are drawn
PLACEMENT_SPARES: Final = 30  # nodes that may step in, known to each message
READ_SMALL_OCTETS_MAX: Final = 64 * KIB  # as stored; a message up to this is read whole, with its neighbours
READ_SMALL_ALL_OCTETS_MAX: Final = 4 * MIB  # uncompressed, of one call: four times what a session reads ahead
READ_STRETCH_OCTETS_MAX: Final = 256 * KIB  # of a log, for neighbours
READ_AHEAD_MESSAGES: Final = 256  # how many a reader that goes through a mailbox is ahead
READ_AHEAD_OCTETS_MAX: Final = 1 * MIB  # and what they hold of memory for one session
READ_AHEAD_ALL_OCTETS_MAX: Final = 64 * MIB  # and for all sessions together
READ_AHEAD_PLACES: Final = 512  # messages whose nodes are asked for at once

COMMIT_WINDOW_S: Final = 20.0  # law 2: a node refuses a commit whose stamp is older
SPARE_MARGIN_S: Final = 2.0  # law 2: feeding a spare ends this long before its stamp is too old
STAMP_AGE_MAX_S: Final = 20.0  # law 2: a node without a younger stamp takes no mail
NODE_CALL_TIMEOUT_S: Final = 10.0  # law 14: every call to a node ends within this, but those that move much
NODE_OPEN_WAIT_S: Final = 10.0  # how long a start waits for nodes; who is not open by then is opened while the others serve
NODE_OPEN_TIMEOUT_S: Final = 600.0  # law 14: recovery may have to read the whole log; until then the node is away
NODE_COMPACT_TIMEOUT_S: Final = 60.0  # law 14: a search for a segment worth rewriting reads several, in turns with others
NODE_CLOSE_WAIT_S: Final = 5.0  # how long a stop waits for a node that hangs
LANE_CLOSE_WAIT_S: Final = 1.0  # how long a stop waits for a thread whose work was not awaited, or hangs
STREAM_ABANDONED_S: Final = 3600.0  # a stream that got no chunk for so long: twice what the slowest sender takes for one
BOOTS_MAX: Final = 1000  # openings that a node's chain remembers (law 12)

# -- nodes over the network (docs/peer-protocol.md) ---------------------------------------------------------------
NODE_PAYLOAD_OCTETS_MAX: Final = 1 * MIB  # meta and body of one frame; the receive buffer of a connection holds one
NODE_META_OCTETS_MAX: Final = 65_535  # what its field can say
NODE_MARK_OCTETS_MAX: Final = 1 * MIB  # a mark in a body: 40,000 writer slots
NODE_LAYOUT_OCTETS_MAX: Final = 1 * MIB  # a layout: 5,000 nodes
NODE_EXPEL_IDS_MAX: Final = 512  # ids that one operation names
NODE_EXPELLED_MAX: Final = 10_000  # ids that a machine remembers as expelled
NODE_EXPELLED_BY_MAX: Final = 8  # ids of those who said so, for each: what only the expelled have said is void
NODE_FOLLOW_WAIT_S: Final = 2.0  # how long a fence waits for those who are connected to say that they go by the layout
NODE_UNTOLD_S: Final = 8.0  # how long a node that came back waits for a keeper's word of the layout before it takes mail (P14)
NODE_PIECE_OCTETS: Final = 64 * KIB  # of a body: small commits beside bulk take 1 ms; with 256 KiB 4 ms, with 4 MiB 23 ms
NODE_WINDOW_OCTETS: Final = 4 * MIB  # payload of unanswered operations on one connection
NODE_WINDOW_OPERATIONS: Final = 1024  # unanswered operations on one connection
NODE_OPERATION_OCTETS_MAX: Final = RECORD_BODY_OCTETS_MAX + MIB  # of one operation, alone in its window when it is over it
NODE_ANSWER_OCTETS_MAX: Final = 64 * MIB  # of one answer; lists come in pages far below it
NODE_PAGE_OCTETS: Final = 4 * MIB  # of checkpoints in one answer, or what one record takes
NODE_PAGE_NAMES: Final = 8  # names of checkpoints looked through for one answer
NODE_PAGE_ITEMS_MAX: Final = 10_000  # of a scan or an inventory
NODE_KEYS_MAX: Final = 65_536  # named in one operation, each once
NODE_TEXT_CHARS_MAX: Final = 512  # of a reason that is told to a peer
NODE_HELLO_TIMEOUT_S: Final = 10.0  # from the TLS handshake to the first frame
NODE_FRAME_TIMEOUT_S: Final = 10.0  # for one frame that has begun: 6.5 KB/s, which any line between machines carries
NODE_OPERATION_TIMEOUT_S: Final = 10.0  # between two pieces of one operation
NODE_SILENCE_S: Final = 15.0  # a peer that asks nothing, no ping either, for so long is gone
NODE_WRITE_TIMEOUT_S: Final = 15.0  # a peer that does not read
NODE_ANSWERS_OCTETS_MAX: Final = 4 * MIB  # answers that a peer has not read yet; beyond it its reads wait
NODE_READS_AT_ONCE: Final = 16  # of one connection
NODE_READING_OCTETS_MAX: Final = RECORD_BODY_OCTETS_MAX  # what the reads under way on one connection may answer together
NODE_SLICE_KEYS: Final = 256  # of those that one operation names are asked of a node at once
NODE_HELD_OCTETS_MAX: Final = 128 * MIB  # unanswered operations of all connections; beyond it the bulk ones are not read
NODE_PING_INTERVAL_S: Final = 1.0  # law 2: how old a stamp gets
NODE_PING_TIMEOUT_S: Final = 4.0  # P20: a blip is at most 5 s; without an answer and any progress the connection is given up
NODE_BULK_TIMEOUT_S: Final = 15.0  # the same of the bulk connection, which a node with too much to hold does not read meanwhile
NODE_PINGS_RESERVED: Final = 2  # operations of a window that are kept for pings, with their octets
NODE_UNSENT_OCTETS: Final = 256 * KIB  # that wait to go out, before no more is asked: a ping waits behind so much at most
NODE_ROOM_WAIT_S: Final = 3.0  # how long a COMMIT waits for room in the window; then it was never asked
NODE_OVERDUE_S: Final = 15.0  # after its deadline an operation without an answer, where none is given, ends the connection
NODE_PINGS_PER_S_MAX: Final = 50  # of one connection
NODE_STAT_INTERVAL_S: Final = 0.1  # how often a node looks whether its figures have changed, and pushes them
NODE_CALL_GRACE_S: Final = 1.0  # how much longer the far end waits than the node, to hear its reason
NODE_CONNECT_TIMEOUT_S: Final = 4.0  # P20
NODE_RECONNECT_FIRST_S: Final = 0.1
NODE_RECONNECT_MAX_S: Final = 5.0
NODE_CONNECTIONS_MAX: Final = 1024  # two for each process that speaks to the node
NODE_HANDSHAKES_MAX: Final = 64  # connections that have not said who they are
NODE_SESSIONS_MAX: Final = 4096  # instances whose session number is remembered
NODE_CLAIMS_MAX: Final = 500_000  # keys, twice, whose bringer is remembered for an abort
NODE_CLAIM_S: Final = 60.0  # for at least so long: an abort is confirmed within the window only (law 5)

# -- certificates and enrolment (docs/peer-protocol.md, section 8) -------------------------------------------------
AUTHORITY_DAYS: Final = 7300.0  # the authority of a cluster lives for twenty years
CERTIFICATE_DAYS: Final = 90.0  # of everybody else
CERTIFICATE_RENEW_SHARE: Final = 2 / 3  # of its life: a month is left to mend an authority that is away
CERTIFICATE_BACKDATED_S: Final = 3600.0  # begins so long before it is made: clocks of machines differ
CERTIFICATE_LOOK_S: Final = 60.0  # how often a process looks whether its certificate is to be renewed, or its files changed
EXPELLED_LOOK_S: Final = 10.0  # how often a keeper looks whether nodes are to hear of somebody who was expelled
TOKEN_LIVES_S: Final = 3600.0  # from `node add` to `join`
TOKEN_KEPT_S: Final = 86_400.0  # after its end: who lost the answer may ask for it again
TOKEN_GUESSES_MAX: Final = 10  # wrong secrets for one token, of 2^128; then it is worth nothing
GROUP_CHARS_MAX: Final = 64  # of the name of a failure domain
SITE_CHARS_MAX: Final = 64  # of the name of a site
ENROLMENT_FRAME_OCTETS_MAX: Final = 32 * KIB  # a request or a certificate has less than 2 KiB, settings of a front end a few
ENROLMENT_REQUEST_OCTETS_MAX: Final = 8 * KIB  # a request for a certificate with a P-256 key has some 300
ENROLMENT_TIMEOUT_S: Final = 20.0  # for all of one connection
ENROLMENT_CONNECTIONS_MAX: Final = 64
ENROLMENT_CONNECTIONS_PER_ADDRESS_MAX: Final = 8
ENROLMENT_HANDSHAKES_MAX: Final = 16  # at once; the oldest makes room
ENROLMENT_TURN_S: Final = 0.05  # between two handshakes of all together: some 7 ms of a core each, for both ends
ENROLMENT_BURST: Final = 60  # of all, that may come at once
ENROLMENT_ADDRESS_TURN_S: Final = 1.0  # the same of one address: machines behind one share it
ENROLMENT_ADDRESS_BURST: Final = 30
ENROLMENT_WAIT_MAX_S: Final = 5.0  # who would wait longer for his turn is not heard, and asks again
ENROLMENT_TRACKED_MAX: Final = 10_000  # addresses, the latest

# -- index and directory ------------------------------------------------------------------------------------------
INDEX_GATHER_S: Final = 0.003  # how long a transaction waits for deliveries that are on their way
INDEX_OVERLAP_S: Final = 0.05  # a transaction that takes longer holds up nobody: the next begins beside it
INDEX_BUSY_TIMEOUT_S: Final = 5.0  # how long a statement waits for another process that has the database locked
INDEX_BATCH_MAX: Final = 256  # deliveries entered in one transaction
INDEX_SHARED_BATCH_MAX: Final = 128  # the same where others write too: 15,000/s, and a lock is held for 8 ms
INDEX_SHARED_ENOUGH: Final = 32  # so many do not wait for more there
SLOT_SILENT_S: Final = 86_400.0  # law 10: a writer slot that was not used for so long belongs to nobody
INDEX_WRITERS: Final = 2  # connections of one process that write: a batch, and beside it another one, or whatever else
INDEX_READERS_MAX: Final = 8  # connections of one process that read
INDEX_CONNECT_S: Final = 2.0  # for each address of the database by itself; P20 with the wait below
INDEX_COMMAND_S: Final = 5.0  # for each statement, at both ends; a connection that was cut would hang for ever
INDEX_LOCK_S: Final = 1.0  # how long a statement waits for what somebody else holds; then the batch is halved
INDEX_LOCK_TRIES: Final = 3  # of a transaction that waited so long for one row; `INDEX_WAIT_S_DEFAULT` is over by then
INDEX_IDLE_S: Final = 5.0  # a process that stops in a transaction holds up the others so long; the server ends it
INDEX_KEEPALIVE_S: Final = 10.0  # either end asks whether the other is there, after so long without a word
INDEX_KEEPALIVES: Final = 3  # so many times; a machine that died is known after 40 s, and its locks are free before
INDEX_CLOSE_S: Final = 10.0  # how long a stop waits for what is under way there; the nodes' records have it anyway
INDEX_LONG_S: Final = 600.0  # for a statement of a move: it counts, or empties, a table of any size
REBUILD_LEFT_S: Final = 86_400.0  # what a rebuild has read and did not come to put in place is taken up for so long
MOVE_PAGE_ROWS: Final = 2000  # rows of an index that are moved in one transaction, at most
MOVE_PAGE_OCTETS: Final = 4 * MIB  # about so many octets of them: a part of a view has 200 KB
INDEX_TURN_S: Final = 5.0  # how long a call waits for a connection that is free
INDEX_TRIES_MAX: Final = 8  # of a transaction that others stand in the way of
INDEX_WAIT_S_DEFAULT: Final = 3.0  # P20: with a node's receipt a blip is at most 5 s; then reconcile enters it
INDEX_PAGE_ROWS: Final = 2000  # rows fetched at a time when listing
DIRECTORY_CACHE_MAX: Final = 100_000
DIRECTORY_CACHE_TTL_S: Final = 30.0
DIRECTORY_STALE_S: Final = 3600.0  # P14: served while the directory is away
DIRECTORY_WAIT_S: Final = 2.5  # one look-up, whatever hangs: then a stale answer or a temporary error (P14)
DIRECTORY_RESOLVE_S: Final = 5.0  # all look-ups that one RCPT or login takes
DIRECTORY_AWAY_S: Final = 1.0  # after trouble nobody asks for so long, then one does: a directory that hangs costs few a wait
DIRECTORY_OWNERS_S: Final = 1.0  # how long a look-up waits to hear from the index whose an id was
DIRECTORY_STATEMENT_S: Final = 1.0  # one look-up on one connection; a second is tried, on another host if there is one
DIRECTORY_CONNECT_S: Final = 1.0  # each host by itself
DIRECTORY_NEXT_HOST_S: Final = 0.25  # a host that has not answered by then is raced by the next one
DIRECTORY_LONG_S: Final = 60.0  # statements of an operator: lists, imports, the schema
DIRECTORY_IDLE_S: Final = 300.0  # a connection that nobody used for so long is closed: firewalls forget it
DIRECTORY_LAG_S: Final = 10.0  # after a change this process asks the primary: a standby may be so late
DIRECTORY_CONNECTIONS_DEFAULT: Final = 4  # of one process; a look-up holds one for less than a millisecond
DIRECTORY_BATCH_ROWS: Final = 200  # in one INSERT: nine parameters each, far below the 32,767 of PostgreSQL
DIRECTORY_ROWS_MAX: Final = 1000  # that an operator's statement answers with for one address: a forward with a row for each
DIRECTORY_TRIES_MAX: Final = 3  # of a transaction that met another (40001, 40P01, 1213)
ALIAS_DEPTH_MAX: Final = 10
FORWARD_DESTINATIONS_MAX: Final = 100
INDEX_WAITING_MAX: Final = 4096  # deliveries that wait for a locked index; beyond it the nodes' records alone must do
EPOCH_JUMP: Final = 1_000_000  # law 11: how far numbers leap for each epoch, and how many a mailbox gets between checkpoints
UNCLEAN_JUMP: Final = 10_000  # law 10: the same after a process that did not say that it stopped (SQLite)
NUMBERS_AT_ONCE_MAX: Final = 2000  # law 10: given in one transaction to one mailbox; a COPY of more is refused
VIEW_TAIL_ROWS: Final = 2000  # entries and changes behind a stored view before it is merged
VIEW_AT_ONCE_ROWS: Final = 500  # of a view are unpacked on the event loop, in half a millisecond; more in a lane
VIEW_PART_ROWS: Final = 4096  # entries in one part of a stored view, and in one record of a checkpoint
UID_MAX: Final = 2**32 - 1
KEYWORDS_MAX: Final = 48  # of a mailbox: flag bits 15 to 62; system flags have those below, the sign none
INDEX_VIEWS_MAX: Final = 10_000  # views of mailboxes that an index keeps to go on from
INDEX_VIEWS_MESSAGES_MAX: Final = 500_000  # and the messages in them, of 52 octets each
UIDVALIDITY_CLOCK_MAX: Final = 3_000_000_000  # where a clock beyond 2065 begins: epochs leap through the rest
CHANGE_UIDS_MAX: Final = 1 << 24  # UIDs in one change, so that damaged ones are not unpacked into all memory

# -- outbound -----------------------------------------------------------------------------------------------------
QUEUE_LIFETIME_S: Final = 5 * 86_400.0  # RFC 5321 §4.5.4.1: 4-5 days
QUEUE_RETRY_FIRST_S: Final = 60.0
QUEUE_RETRY_MAX_S: Final = 4 * 3600.0
QUEUE_AHEAD_MAX_S: Final = 2 * QUEUE_RETRY_MAX_S  # a row that is due later than that was dated by a clock that ran ahead
QUEUE_LEASE_S: Final = 300.0
QUEUE_LEASE_MARGIN_S: Final = 60.0  # a lease that is over so soon is not worked on any more
LEASE_S_MAX: Final = 3600.0  # of a background job: one that ends later was dated by a clock that ran ahead
QUEUE_CONCURRENCY_DEFAULT: Final = 20
QUEUE_PER_DESTINATION_MAX: Final = 10_000  # rows waiting for one destination address's domain
QUEUE_ATTEMPTS_KEPT: Final = 20  # of each row, for the operator
QUEUE_SLOT_WAIT_S: Final = 30.0  # how long a message waits for a connection before others get its turn
QUEUE_IN_HAND_FACTOR: Final = 20  # rows that are worked on, for each connection
QUEUE_NO_ROUTE_RETRY_S: Final = 300.0  # how often mail without a route is looked at
QUEUE_DELAY_NOTICE_S: Final = 4 * 3600.0  # after which who asked for it hears of the delay (RFC 3461 §4.1)
QUEUE_GATHER_S: Final = 0.02  # how long rows are waited for that are leased, or finished, in one transaction
QUEUE_SETTLE_WAIT_S: Final = 10.0  # how long a stop waits for messages on their way out and for what became of them
RETURN_S: Final = 21 * 86_400.0  # how long a rewritten sender leads back
COMMAND_TIMEOUT_S: Final = 10.0  # for a command that hands out a token
SCRAM_ITERATIONS_MAX: Final = 1_000_000  # what a server may ask for; OWASP asks 600,000
SMTP_CLIENT_REPLY_LINE_OCTETS_MAX: Final = 2048
SMTP_CLIENT_REPLY_OCTETS_MAX: Final = 16 * KIB
SMTP_CLIENT_CONNECT_TIMEOUT_S: Final = 30.0
SMTP_CLIENT_REPLY_TIMEOUT_S: Final = 300.0  # RFC 5321 §4.5.3.2
SMTP_CLIENT_PIPELINE_S: Final = 30.0  # for the replies behind the first of a row; then it is asked line by line
SMTP_CLIENT_BLOCK_TIMEOUT_S: Final = 180.0  # §4.5.3.2.5, for a hop that does not read
SMTP_CLIENT_QUIT_TIMEOUT_S: Final = 5.0  # nobody waits longer for a goodbye
SMTP_CLIENT_PROOF_S: Final = 2.0  # how long a reply that a hop may still owe is waited for
SMTP_CLIENT_AHEAD_S: Final = 1.0  # how long a message that has begun behind another one waits for the outcome of that
SMTP_CLIENT_PLAIN_S: Final = 3600.0  # how long a hop that broke its own PIPELINING is spoken to line by line
SMTP_CLIENT_RECIPIENTS_MAX: Final = 100  # in one transaction; RFC 5321 §4.5.3.1.8: every hop takes so many
SMTP_CLIENT_DATA_TIMEOUT_S: Final = 600.0  # §4.5.3.2.6, after the final dot
SMTP_CLIENT_IDLE_S: Final = 10.0  # a pooled connection waits this long for more work
INTERNAL_UNDECIDED_MAX: Final = 10_000  # mail of our own whose outcome is unknown; beyond it none is sent (law 5)
DSN_HEADER_OCTETS_MAX: Final = 50_000  # of the returned message's header
DSN_FULL_OCTETS_MAX: Final = 4 * MIB  # of a message that is returned whole (RET=FULL); a larger one gives its header

# -- keeper -------------------------------------------------------------------------------------------------------
RECONCILE_INTERVAL_S: Final = 10.0  # everything a node holds is in the index within two minutes
RECONCILE_GRACE_S: Final = 60.0  # a delivery in flight is its front end's own business for so long: comfort, not safety (law 6)
RECONCILE_BATCH: Final = 1000
REREAD_RECORDS_MAX: Final = 1000  # of a stretch that could not be read before: what one call shows; the rest stays noted
REREAD_OCTETS_MAX: Final = 8 * MIB  # and what it holds of memory, or one record
REPAIR_BATCH: Final = 64  # messages: what waits for disks and the index waits together
REPAIR_AT_ONCE_OCTETS: Final = 4 * MIB  # of those on their way at the same time; a larger message is alone
REPAIR_AFTER_S_DEFAULT: Final = 300.0  # shorter absences (a reboot) are not repaired around
MAILBOX_NAME_CHARS_MAX: Final = 255  # that an operator names
SALVAGE_WHY_MAX: Final = 20  # messages of a disk that could not be brought back, and are named with the reason
COLLECT_BATCH: Final = 1000
COLLECT_MASS_MAX: Final = 10_000  # P9: more drops than this for one returned disk need the operator (law 12)
CHECKPOINT_INTERVAL_S: Final = 900.0
MARK_INTERVAL_S: Final = 10.0  # law 10: every node gets a mark so often while anything is committed
MARK_NUMBERS_MAX: Final = 4000  # law 10: and after so many numbers were given
ROUND_INTERVAL_S: Final = 600.0  # law 9: how often dead rows are scanned for and forgotten
TOMBSTONE_DAYS_DEFAULT: Final = 30.0  # law 9: tombstones stay at least so long, so that backups of the index may be so old
SCRUB_DAYS_MAX: Final = 14  # law 12: a verdict on each copy within this
COMPACT_STEP_OCTETS: Final = 4 * MIB  # moved in one step of compaction: what a write may have to wait for
COMPACT_DEAD_FRACTION: Final = 0.5

# -- stopping -----------------------------------------------------------------------------------------------------
STOP_REST_S: Final = 25.0  # to write down what became of mail, that all is entered, and that this process stopped
STOP_CLOSE_S: Final = 20.0  # to close nodes, index and directory; what hangs is left as a crash would leave it
STOP_GRACE_S: Final = 5.0  # beside all that, and between the parent's signals
STOP_BACKGROUND_S: Final = STOP_REST_S + STOP_CLOSE_S + STOP_GRACE_S  # of a process without clients, whatever hangs
STOP_S: Final = 2 * DRAIN_TIMEOUT_S + STOP_BACKGROUND_S  # of one that serves: sessions and promises come before
STOP_ALL_S: Final = STOP_S + 2 * STOP_BACKGROUND_S + 3 * STOP_GRACE_S  # of a parent: front ends, then keepers, then nodes

# -- process ------------------------------------------------------------------------------------------------------
CONNECTIONS_MAX_DEFAULT: Final = 2000
CONNECTIONS_PER_ADDRESS_MAX_DEFAULT: Final = 100
WORKER_PAUSE_MAX_S: Final = 30.0  # how long a background job waits after trouble before it tries again
TASK_CANCEL_AGAIN_S: Final = 1.0  # a task that goes on although it was cancelled is told again
WORKER_LONG_S: Final = 10.0  # a step that takes longer is said in `status`
LISTEN_BACKLOG: Final = 1024  # connections that wait to be taken, for each address
WORKERS_MAX: Final = 64  # front-end processes of one machine
WORKER_SLACK: Final = 2  # connections more than its fair share that a front-end process still takes
WORKER_TURN_S: Final = 0.01  # how long one that has more leaves the next ones to the others
WORKER_SILENT_S: Final = 3.0  # one that shows nothing for so long hangs or is gone, and has no share
WORKER_NOTE_S: Final = 0.5  # how often it shows that it is there
WORKER_LEAVE_S: Final = 10.0  # how long the clients of one that is replaced may go on; then they hear 421
PART_PAUSE_FIRST_S: Final = 0.2  # before a process that died is started again; doubles
PART_PAUSE_MAX_S: Final = 30.0
PART_STEADY_S: Final = 60.0  # one that lived for so long begins with the first pause again
PART_READY_S: Final = 60.0  # how long a process that replaces another has to get ready
JOB_LEASE_S: Final = 10.0  # a keeper that dies is replaced within this and a look
JOB_LOOK_S: Final = 3.0  # how often a job that another keeper has is asked for
JOB_RENEW_S: Final = 3.0  # how often a keeper says that it goes on
JOB_VIEW_S: Final = 10.0  # another that sees more nodes for so long does what needs them all
TALLY_S: Final = 5.0  # how old what other processes have counted may be: failed log-ins, recipients of an account
TALLIES_SHOWN_MAX: Final = 10_000  # counts of others that a process goes by, the highest first
JOB_FORGOTTEN_S: Final = 3600.0  # leases that are over for so long are cleared away
PROCESS_NOTE_S: Final = 5.0  # how often a process writes that it is there
PROCESS_LEASE_S: Final = 20.0  # one that has written nothing for so long counts as dead
MAILDROP_LEASE_S: Final = 60.0  # RFC 1939 §8: what a process holds that died is free after this
DESCRIPTORS_RESERVED: Final = 96  # for databases, the log, control, and what is accepted only to be refused
SEGMENTS_OPEN_SHARE: Final = 4  # a quarter of all descriptors may be segments of nodes
CONTROL_LINE_OCTETS_MAX: Final = 1 * MIB
CONTROL_PATH_OCTETS_MAX: Final = 107  # unix(7): 108 with the octet that ends it
NUMBER_MAX: Final = 2**63 - 1  # what a column of a database holds
OPERATOR_ANSWER_S: Final = 4.5  # within 5 s a short operation answers, or says why not
OPERATOR_INDEX_S: Final = 2.0  # how long `status` waits for the index; then the answer says that it is silent
OPERATOR_DIRECTORY_S: Final = 1.5  # how long it waits for a directory that did not answer before
OPERATOR_NODE_S: Final = 2.5  # how long a command on a stopped installation waits for a node that hangs
OPERATOR_COPY_S: Final = 2.5  # how long `where` waits for a node's verdict on a copy
OPERATOR_LOOK_S: Final = 0.2  # how long each part is asked when an operation did not answer
CONFIG_LOOK_S: Final = 10.0  # how long `config check` waits for one kind of look: a disk or a name server may hang
OPERATOR_BEAT_S: Final = 1.0  # how often a long operation shows that it lives
OWNERS_KNOWN_MAX: Final = 200_000  # account ids whose address was compared in this process
CERTIFICATE_WARN_DAYS: Final = 14.0  # before its end
LOG_LINES_WAITING_MAX: Final = 20_000
LOG_LINES_WRITTEN_MAX: Final = 1000  # in one write: what a stuck log holds beside those that wait
LOG_FIELD_CHARS_MAX: Final = 512
SMTP_OUT_BUFFER_OCTETS: Final = 256 * KIB

assert CHUNK_OCTETS * CHUNKS_MAX > 4 * 1024 * MIB, "the largest configurable message fits in chunks"
assert REPLICATE_HELD_OCTETS_MAX >= 2 * CHUNK_OCTETS
assert RECORD_BODY_OCTETS_MAX > CHUNK_OCTETS + 1024
assert INDEX_WAIT_S_DEFAULT < 5.0, "P20: an index that does not answer is a blip of at most 5 s"
assert QUEUE_SETTLE_WAIT_S + NODE_CALL_TIMEOUT_S < STOP_REST_S and INDEX_CLOSE_S + NODE_CLOSE_WAIT_S < STOP_CLOSE_S, (
    "a stop has time for what it waits for"
)
assert INDEX_GATHER_S < INDEX_OVERLAP_S < INDEX_WAIT_S_DEFAULT / 10, "who waits for another's transaction has time for his own"
assert COMMIT_WINDOW_S + INDEX_WAIT_S_DEFAULT < DRAIN_TIMEOUT_S, "what was asked of nodes is decided before the process stops"
assert 2 * NODE_RECEIPT_TIMEOUT_S < COMMIT_WINDOW_S - SPARE_MARGIN_S, "a spare can be fed within the window"
_SLOWEST_S: Final = SMTP_DATA_RATE_GRACE_S + 2 * CHUNK_OCTETS / SMTP_DATA_RATE_OCTETS_PER_S_MIN
assert _SLOWEST_S < STREAM_ABANDONED_S, "the slowest sender is not given up"
assert max(INDEX_BATCH_MAX, RECONCILE_BATCH) <= NUMBERS_AT_ONCE_MAX, "one batch of either is one transaction"
assert WORKER_PAUSE_MAX_S < QUEUE_LEASE_MARGIN_S < QUEUE_LEASE_S / 3, "a lease is let go of before it is over"
assert EPOCH_JUMP > UNCLEAN_JUMP >= 2 * MARK_NUMBERS_MAX + NUMBERS_AT_ONCE_MAX, (
    "no number given since the last mark is given again: while one is on its way as many more may be given"
)
assert NODE_PIECE_OCTETS + NODE_META_OCTETS_MAX <= NODE_PAYLOAD_OCTETS_MAX <= NODE_WINDOW_OCTETS
assert min(STAMP_AGE_MAX_S, NODE_SILENCE_S) > NODE_PING_INTERVAL_S + NODE_PING_TIMEOUT_S, "law 2: stamps stay young"
assert ENROLMENT_WAIT_MAX_S < ENROLMENT_TIMEOUT_S / 2, "who waits for his turn has time for his question"
assert NODE_FOLLOW_WAIT_S > LAYOUT_LOOK_S and NODE_UNTOLD_S > NODE_RECONNECT_MAX_S + LAYOUT_LOOK_S, (
    "who follows the layout has time to say so, and a keeper to be there"
)
assert NODE_BULK_TIMEOUT_S > NODE_CALL_TIMEOUT_S + NODE_CALL_GRACE_S, "what is held back is over before the link is given up"
assert NODE_ROOM_WAIT_S + 0.5 < NODE_RECEIPT_TIMEOUT_S, "who waits for a receipt hears that it was never asked for"
assert NODE_CLAIM_S > COMMIT_WINDOW_S + INDEX_WAIT_S_DEFAULT, "what an abort may still confirm is remembered"
assert DIRECTORY_STATEMENT_S + DIRECTORY_CONNECT_S + DIRECTORY_NEXT_HOST_S < DIRECTORY_WAIT_S < DIRECTORY_RESOLVE_S, (
    "a look-up has time for a second host"
)
assert DIRECTORY_OWNERS_S < DIRECTORY_WAIT_S < DIRECTORY_STALE_S
assert NODE_SLOW_S < NODE_READ_TIMEOUT_S < 5.0, "P20: a blip is at most 5 s"
assert SMTP_COMMAND_LINE_OCTETS_MAX > PATH_OCTETS_MAX + ENVID_OCTETS_MAX + ORCPT_OCTETS_MAX + 512
assert RECONCILE_INTERVAL_S + RECONCILE_GRACE_S < 120.0, "section 6: in the index within two minutes"
assert JOB_RENEW_S < JOB_LEASE_S / 2 and JOB_LEASE_S + JOB_LOOK_S < PROCESS_LEASE_S <= LEASE_S_MAX, (
    "one lost renewal loses nothing"
)
assert WORKER_NOTE_S < WORKER_SILENT_S / 2
