//! How both sides set up the websocket library.

use phonehome_proto::limits::MAX_MESSAGE;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

/// The protocol's limits as the library's: messages are written as they come, and one message plus control frames is
/// all that may wait. `read_buffer` is in bytes and allocated for each socket.
#[must_use]
pub fn config(read_buffer: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(read_buffer)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}
