/** Sizes, offsets and flags of both virtqueue formats, as the virtio specification names them. */

/** Largest queue size of either format (virtio 1.3, 2.7 and 2.8.10.1). */
export const VIRTQUEUE_MAX_SIZE = 32768;

// struct virtq_desc (2.7.5): le64 addr, le32 len, le16 flags, le16 next.
/** Bytes of `struct virtq_desc` and of `struct pvirtq_desc`. */
export const DESC_SIZE = 16;
/** Alignment of the descriptor area of both formats. */
export const DESC_ALIGN = 16;
/** `virtq_desc.flags`: the chain goes on at `next`. */
export const VIRTQ_DESC_F_NEXT = 1;
/** `virtq_desc.flags`: the device may only write this element (otherwise only read). */
export const VIRTQ_DESC_F_WRITE = 2;
/** `virtq_desc.flags`: the element is a table of descriptors. */
export const VIRTQ_DESC_F_INDIRECT = 4;

// struct virtq_avail (2.7.6): le16 flags, le16 idx, le16 ring[n], le16 used_event.
/** Bytes before `virtq_avail.ring`. */
export const AVAIL_RING_OFFSET = 4;
/** Alignment of the available ring. */
export const AVAIL_ALIGN = 2;
/** `virtq_avail.flags`: the driver does not want used buffer notifications. */
export const VIRTQ_AVAIL_F_NO_INTERRUPT = 1;

// struct virtq_used (2.7.8): le16 flags, le16 idx, { le32 id, le32 len } ring[n], le16 avail_event.
/** Bytes before `virtq_used.ring`. */
export const USED_RING_OFFSET = 4;
/** Bytes of `struct virtq_used_elem`. */
export const USED_ELEM_SIZE = 8;
/** Alignment of the used ring. */
export const USED_ALIGN = 4;
/** `virtq_used.flags`: the device does not want available buffer notifications. */
export const VIRTQ_USED_F_NO_NOTIFY = 1;

// struct pvirtq_desc (2.8.13): le64 addr, le32 len, le16 id, le16 flags. NEXT, WRITE, INDIRECT as above.
/** `pvirtq_desc.flags`: available bit, compared with the wrap counter. */
export const VIRTQ_DESC_F_AVAIL = 1 << 7;
/** `pvirtq_desc.flags`: used bit, compared with the wrap counter. */
export const VIRTQ_DESC_F_USED = 1 << 15;

// struct pvirtq_event_suppress (2.8.14): le16 desc (off 0-14, wrap 15), le16 flags (0-1).
/** Bytes of `struct pvirtq_event_suppress`. */
export const EVENT_SUPPRESS_SIZE = 4;
/** Alignment of both event suppression structures. */
export const EVENT_SUPPRESS_ALIGN = 4;
/** `pvirtq_event_suppress.flags`: notify always. */
export const RING_EVENT_FLAGS_ENABLE = 0;
/** `pvirtq_event_suppress.flags`: do not notify. */
export const RING_EVENT_FLAGS_DISABLE = 1;
/** `pvirtq_event_suppress.flags`: notify at the descriptor that `desc` names; with EVENT_IDX only. */
export const RING_EVENT_FLAGS_DESC = 2;
